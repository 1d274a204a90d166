"""Texts as ids, for fast and slow tokenizers and any script: special tokens around a text, and spelled in one."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.tokenization_python import PythonBackend

from grade.errors import GradeError
from grade.tasks.encoding import encode

MARKS = {"$A": ([], []), "<s> $A": ([0], []), "$A </s>": ([], [1]), "<s> $A </s>": ([0], [1])}
PATTERNS = {"$A": "none", "<s> $A": "bos", "$A </s>": "eos", "<s> $A </s>": "bos_eos"}
WORDS = ["<s>", "</s>", "<unk>", "字", "слово", "کلمه", "<", "/s>"]  # no Latin letter: "a" has no token of its own
NAMES = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>")


def fast(template, unk="<unk>"):
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token=unk))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", 0), ("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, **NAMES)


class Slow(PythonBackend):
    """Words as tokens, in Python."""

    vocab_size = len(WORDS)

    def get_vocab(self):
        return {word: i for i, word in enumerate(WORDS)}

    def _tokenize(self, text, **_):
        return text.split()

    def _convert_token_to_id(self, token):
        return self.get_vocab().get(token, 2)

    def _convert_id_to_token(self, index):
        return WORDS[index]


def slow(template):
    return Slow(special_tokens_pattern=PATTERNS[template], **NAMES)


def unigram():
    """As T5 has it: the vocabulary itself holds `</s>`, as its likeliest piece."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((c, -3.0) for c in "▁ab</s>")]
    inner = Tokenizer(models.Unigram(pieces, unk_id=2))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", unk_token="<unk>", pad_token="<pad>")


@pytest.mark.parametrize("template", MARKS)
@pytest.mark.parametrize("make", [fast, slow])
def test_what_stands_around_a_text_is_told_without_a_letter(make, template):
    """The last token of every row was lost where "a" has no token."""
    tokenizer, (before, behind) = make(template), MARKS[template]
    assert tokenizer("字 слово")["input_ids"] == [*before, 3, 4, *behind]
    assert encode(tokenizer, ["字 слово", "", "کلمه", "x"], 9) == [[*before, 3, 4], [], [*before, 5], [*before, 2]]
    assert encode(tokenizer, ["字 слово"], 9, special_tokens=False) == [[3, 4]]
    assert encode(tokenizer, ["", " "], 9) == [[], []]


@pytest.mark.parametrize("template", ["$A", "<s> $A </s>"])
@pytest.mark.parametrize("make", [fast, slow])
def test_a_spelled_special_token_stays_text(make, template):
    """Both word tokenizers know `</s>` as a word; its two parts are words too."""
    tokenizer, (before, _) = make(template), MARKS[template]
    assert encode(tokenizer, ["字 </s> слово"], 9) == [[*before, 3, 6, 7, 4]]
    assert encode(tokenizer, ["</s> </s>", "<s> 字"], 9) == [[*before, 6, 7, 6, 7], [*before, 6, 2, 3]]
    assert encode(tokenizer, ["<unk>"], 9) == [[*before, 2]]  # what is not known may be written


@pytest.mark.parametrize("text", ["a</s>b", "</s>", "a </s></s> b"])
def test_a_unigram_piece_stays_text(text):
    tokenizer = unigram()
    (row,) = encode(tokenizer, [text], 99)
    spelled = "".join(tokenizer.convert_ids_to_tokens(row)).replace("▁", "")
    assert 1 not in row and spelled == text.replace(" ", "")


def test_shared_models_read_the_spelling(imdb_lm, stories260k):
    for folder in (imdb_lm, stories260k):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        for name in tokenizer.all_special_tokens:
            (row,) = encode(tokenizer, [f"A good film {name} and more"], 99)
            own = row[1:] if row[0] == tokenizer.bos_token_id else row
            assert not set(own) & set(tokenizer.all_special_ids), name
            assert f"A good film {name} and more" == tokenizer.decode(own).strip()
        assert encode(tokenizer, ["A good film."], 99) == [tokenizer("A good film.")["input_ids"]]


def test_a_text_that_cannot_be_read_ends_in_words():
    with pytest.raises(GradeError, match="tokenizer cannot read a text of the task .*Choose a model"):
        encode(fast("$A", unk="[none]"), ["x"], 9)

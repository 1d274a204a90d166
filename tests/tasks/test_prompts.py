"""Prompts: cleaning, sentences, limits in characters and tokens, special tokens."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from grade.config import Config
from grade.errors import GradeError
from grade.tasks.base import Example
from grade.tasks.encoding import encode
from grade.tasks.texts import TextTask, clean, opening


def word_tokenizer(template="$A"):
    """Words as tokens, `a` known, and specials around the text as `template` says; BOS and EOS are one id."""
    words = ["<e>", "<p>", "a", "b", "c", "d", "e", "<u>"]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<u>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<e>", 0)])
    names = dict(bos_token="<e>", eos_token="<e>", pad_token="<p>", unk_token="<u>")
    return PreTrainedTokenizerFast(tokenizer_object=inner, **names)


# --- openings ---


def test_clean():
    assert clean(" One<br /><br/>two\n\tthree<BR>four\u00a0 ") == "One two three four"


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("It ran. It hid. It won.", "It ran."),
        ("Really?! Yes.", "Really?!"),
        ('He said "No." Then he left.', 'He said "No."'),
        ("(A joke.) Not one.", "(A joke.)"),
        ("Well... maybe it is. Or not.", "Well... maybe it is."),
        ("Mr. J. R. Smith met Dr. No vs. Mrs. May. Good.", "Mr. J. R. Smith met Dr. No vs. Mrs. May."),
        ("Some actors, e.g. Bogart, smoke. Bad.", "Some actors, e.g. Bogart, smoke."),
        ("Nobody knew but I. He slept.", "Nobody knew but I."),
        ("I give it 3.5 stars. Enough.", "I give it 3.5 stars."),
        ("Version 2. 10 of 10.", "Version 2."),
        ("no capitals here. none at all", "no capitals here. none at all"),
        ("良い映画。とても！", "良い映画。"),
        ("No end", "No end"),
        ("", ""),
    ],
)
def test_first_sentence(text, first):
    assert opening(text, 1, 200) == first


def test_opening_counts_sentences_and_cuts_at_a_words_end():
    text = "It ran. It hid. It won."
    assert [opening(text, n, 200) for n in (2, 3, 4)] == ["It ran. It hid.", text, text]
    cuts = {6: "It", 7: "It ran.", 9: "It ran.", 10: "It ran. It", 23: text}
    assert {n: opening(text, 3, n) for n in cuts} == cuts
    assert opening("x" * 50, 1, 20) == "x" * 20


@settings(max_examples=150, deadline=None)
@given(st.text() | st.text(alphabet="Ab .!?\"'…)<br/>I"), st.integers(1, 4), st.integers(1, 60))
def test_opening_is_a_prefix_within_its_limits(raw, sentences, max_chars):
    text = clean(raw)
    cut = opening(text, sentences, max_chars)
    assert text.startswith(cut) and len(cut) <= max_chars and bool(cut) == bool(text) and cut == cut.strip()
    at_a_words_end = cut == text or text[len(cut)] == " "
    one_long_word = len(cut) == max_chars and " " not in cut
    # a script without spaces may end a sentence inside what counts as a word
    assert at_a_words_end or one_long_word or cut[-1] in "。！？”’」』）"


def test_long_rows_of_marks_are_quick():
    assert opening("." * 200_000 + "a", 2, 300_000).startswith("...")


# --- tokens ---


@pytest.mark.parametrize("template", ["$A", "<e> $A", "$A <e>", "<e> $A <e>"])
def test_specials_in_front_stay_and_those_behind_go(template):
    start = [0] if template.startswith("<e>") else []
    tokenizer = word_tokenizer(template)
    assert encode(tokenizer, ["a b c", "", "d"], 10) == [start + [2, 3, 4], [], start + [5]]
    assert encode(tokenizer, ["a b c d e"], 2 + len(start)) == [start + [2, 3]]
    assert encode(tokenizer, ["a <e> b"], 10) == [start + [2, 7, 7, 3]]  # text, read as < and e>
    if start:
        with pytest.raises(GradeError, match="limit of 1 tokens leaves no room"):
            encode(tokenizer, ["a"], 1)


def test_truncation_side_and_saved_truncation_do_not_matter():
    tokenizer = word_tokenizer()
    tokenizer.truncation_side = "left"
    tokenizer.backend_tokenizer.enable_truncation(2)
    assert encode(tokenizer, ["a b c d"], 3) == [[2, 3, 4]]


def test_prompts_skip_what_is_empty_and_keep_the_order():
    split = [Example(f"train/{i}", text, i % 2) for i, text in enumerate(["", "b", "z", "c", "d"])]
    task = TextTask("here", Config().task, [], split, [], [])
    tokenizer = word_tokenizer("<e> $A")
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("z", "")  # a text that leaves no token
    assert task.prompts("policy", tokenizer) == [[0, 3], [0, 4], [0, 5]]
    assert task.prompts("policy", tokenizer, 2) == [[0, 3], [0, 4]]
    assert task.prompts("policy", tokenizer, 9) == task.prompts("policy", tokenizer)
    assert task.prompts("policy", tokenizer, 0) == []

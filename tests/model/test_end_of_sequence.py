"""End of sequence: whose ids count, which are refused, and what a run says about them."""

from __future__ import annotations

import pytest
from tiny import CONFIGS, EOS, VOCAB, TinyTokenizer, base_model, policy_around

from grade.config import Config
from grade.errors import GradeError
from grade.model.end_of_sequence import how_responses_end, warning_without_ends


def with_eos(generation, model=EOS):
    base = base_model(CONFIGS["llama"]())
    base.generation_config.eos_token_id, base.config.eos_token_id = generation, model
    return base


@pytest.mark.parametrize(
    "generation, model, expected",
    [
        ([9, 5, 9], 7, [EOS, 5, 9]),
        (11, 7, [EOS, 11]),
        (None, [8, 2], [2, EOS, 8]),
        (None, None, [EOS]),
        (EOS, 7, [EOS]),
        (VOCAB - 1, 7, [EOS, VOCAB - 1]),
        (0, 7, [0, EOS]),
    ],
)
def test_eos_ids_are_those_of_the_tokenizer_and_of_the_generation_config_or_else_the_model(generation, model, expected):
    """The tokenizer said `<|im_end|>` and the generation config `</s>`: no response ended."""
    assert policy_around(with_eos(generation, model)).eos_ids.tolist() == expected


def test_an_eos_id_that_is_no_number_at_all_is_refused():
    """A list in the list was a TypeError."""
    with pytest.raises(GradeError, match=r"the generation config has the eos_token_id \[1\]"):
        policy_around(with_eos([[1]]))


@pytest.mark.parametrize("wrong", [VOCAB, -1, [EOS, VOCAB + 7], True, "3", 2.0])
def test_eos_ids_beyond_the_vocabulary_are_refused(wrong):
    """V was an IndexError, and -1 kept the last id from being drawn."""
    with pytest.raises(GradeError, match="the generation config has the eos_token_id .* ids are 0 to 60"):
        policy_around(with_eos(wrong))
    if type(wrong) in (int, list):  # what else transformers refuses in a model's config
        with pytest.raises(GradeError, match="the model's config has the eos_token_id"):
            policy_around(with_eos(None, wrong))

    class Beyond(TinyTokenizer):
        eos_token_id = wrong if not isinstance(wrong, list) else wrong[1]

    with pytest.raises(GradeError, match="the tokenizer has the eos_token_id"):
        policy_around(with_eos(EOS), tokenizer=Beyond())


def test_a_run_says_what_ends_a_response_and_warns_when_nothing_did():
    generation, policy = Config().generation, policy_around(with_eos([EOS, 9]), tokenizer=TinyTokenizer(unknown=4))
    line = how_responses_end(generation, policy)
    assert line == (
        "a response ends with '3' (id 3, of the tokenizer and the generation config) or '9' (id 9, of the generation "
        "config)"
    )
    late = policy_around(with_eos(VOCAB - 1), tokenizer=TinyTokenizer(unknown=4))
    assert "never drawn" in how_responses_end(generation, late)
    assert warning_without_ends(generation, 0.01) is None
    assert "generation.max_new_tokens (now 64)" in warning_without_ends(generation, 0.0)
    generation.ignore_eos = True
    assert "nothing ends them" in how_responses_end(generation, policy)
    assert warning_without_ends(generation, 0.0) is None


def test_a_pad_id_outside_the_vocabulary_is_not_used():
    class Padded(TinyTokenizer):
        pad_token_id = -1

    assert policy_around(with_eos(EOS), tokenizer=Padded()).pad_id == EOS

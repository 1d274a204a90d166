"""Measures of samples beside the reward: fluency per byte under any model, repetition, distances from the base."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_run import changed
from transformers import AutoModelForCausalLM, AutoTokenizer

from grade.errors import GradeError
from grade.studies.compare.fluency import (
    BYTES,
    NATS,
    ModelReader,
    TrigramReader,
    fluency,
    load_reader,
    reader_identity,
    shared,
)
from grade.studies.compare.measures import distances, repetition, spread_of
from grade.studies.compare.trigram import Trigrams
from grade.tasks import load_task


class Rows(SimpleNamespace):
    """The part of a rollout that is read."""

    def __len__(self):
        return len(self.tokens)


def rows_of(rows, width):
    """Responses of these tokens, padded to `width` with 0."""
    tokens, mask = torch.zeros(len(rows), width, dtype=torch.int64), torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        tokens[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), True
    return Rows(tokens=tokens, mask=mask)


def test_repetition_is_the_share_of_4_grams_seen_before():
    rows = [
        [1, 2, 3, 4, 1, 2, 3, 4],  # 1234 2341 3412 4123 1234: one of five
        [7] * 8,  # four of five
        [1, 2, 3],  # none there
        [1, 2, 3, 4],
        [0, 0, 0, 0, 5],  # padding is 0 too
    ]
    np.testing.assert_allclose(repetition(rows_of(rows, 8)), [0.2, 0.8, 0.0, 0.0, 0.0])
    assert repetition(rows_of([[1], [2, 3]], 2)).tolist() == [0.0, 0.0]


def test_distances_are_from_the_base():
    base = spread_of([{"length": 4, "entropy": 8.0}, {"length": 8, "entropy": 8.0}])
    assert base == {"length": [4.0, 8.0], "entropy": [2.0, 1.0]}
    same = distances(base, base)
    assert same == {"length_distance": 0.0, "entropy_distance": 0.0}
    other = spread_of([{"length": 10, "entropy": 30.0}, {"length": 6, "entropy": 18.0}])
    # Sorted against sorted: 6 - 4 and 10 - 8; 3 - 1 and 3 - 2.
    assert distances(other, base) == pytest.approx({"length_distance": 2.0, "entropy_distance": 1.5})


def test_what_prompt_and_text_share():
    assert shared([1, 2, 3], [1, 2, 3, 4]) == 3 and shared([1, 2], [1, 9, 3]) == 1 and shared([], [1]) == 0


class Bytes:
    """Ids are bytes; the last of two letters `q` and `u` becomes one token, so that a border may be crossed."""

    all_special_ids, all_special_tokens, added_tokens_decoder, unk_token_id = [], [], {}, None

    def __call__(self, texts, **_):
        return {"input_ids": [list(text.replace("qu", "\x00").encode()) for text in texts]}


def test_trigrams_read_what_a_text_adds_to_its_prompt():
    model = Trigrams([list(b"a good film"), list(b"a\x00ick film")], size=256)
    reader = TrigramReader(Bytes(), model)
    costs, sizes = zip(*reader.read(["a", "a q", "a"], ["a good", "a quick", "a"]), strict=True)
    first = model.logprobs([list(b"a good")])[0]
    assert costs[0] == pytest.approx(-first[1:].sum()) and costs[2] == 0 and sizes == (5, 4, 0)
    assert costs[1] == pytest.approx(-model.logprobs([list(b"a \x00ick")])[0][2:].sum())  # `qu` is the response's


@pytest.fixture(scope="module")
def reader(tiny_model):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_model), AutoTokenizer.from_pretrained(tiny_model)
    return ModelReader(model, tokenizer, tokenizer.bos_token_id or tokenizer.eos_token_id)


PAIRS = [
    ("The film is good.", "The film is good. The plot is bad and slow."),
    ("It was", "It was great"),
    ("", "The film"),
    ("The end.", "The end."),
]


def test_a_model_reads_what_a_text_adds_to_its_prompt(reader):
    """By one text at a time, against transformers' own loss."""
    costs = reader.read(*zip(*PAIRS, strict=True))
    for (prompt, text), (cost, size) in zip(PAIRS, costs, strict=True):
        given, whole = reader._encoded([prompt, text])
        labels = torch.tensor([whole])
        labels[:, : max(shared(given, whole), 1)] = -100
        counted = int((labels != -100).sum())
        loss = reader.model(input_ids=torch.tensor([whole]), labels=labels).loss if counted else torch.zeros(())
        assert cost == pytest.approx(loss.item() * counted, rel=1e-4, abs=1e-6)
        assert cost == pytest.approx(reader.read([prompt], [text])[0].nats, rel=1e-5)  # batches change nothing
        assert size == len(text.encode()) - len(prompt.encode())
    assert costs[3] == (0.0, 0)


def test_a_prompt_is_cut_to_the_models_context_before_a_response_is(reader):
    long = " ".join(["The film is good."] * 80)
    ((cost, size),) = reader.read([long], [f"{long} It was great."])
    assert np.isfinite(cost) and cost > 0 and size == len(" It was great.")


def test_of_a_response_beyond_the_context_the_first_tokens_are_read_and_their_bytes_counted(reader, monkeypatch):
    """A short context in which the beginning of a response is read as a whole response is in a long one."""
    prompt, beginning = "It was the film", " is good. The plot is slöw."
    given, whole = (len(reader._encoded([text])[0]) for text in (prompt, prompt + beginning))
    last = reader.read([prompt], [prompt + beginning])[0]
    rest = " The film is bad and slow." * 3
    monkeypatch.setattr(reader, "longest", whole)
    assert reader.read([prompt], [prompt + beginning])[0] == last
    # The prompt makes room as far as one token of it stays.
    monkeypatch.setattr(reader, "longest", whole - given + 1)
    found = reader.read([prompt, prompt], [prompt + beginning + rest, prompt + beginning])
    assert found[0] == pytest.approx(found[1]) and found[0].size == last.size < len((beginning + rest).encode())
    assert found[0].nats > 0


def test_a_byte_means_the_same_to_every_reader(reader):
    tokenizer = reader.tokenizer
    ids = tokenizer(["The film", " is gööd"], add_special_tokens=False)["input_ids"]
    found = Rows(
        prompt_ids=torch.tensor([ids[0]]),
        prompt_mask=torch.ones(1, len(ids[0]), dtype=torch.bool),
        tokens=torch.tensor([ids[1]]),
        mask=torch.ones(1, len(ids[1]), dtype=torch.bool),
    )
    policy = SimpleNamespace(tokenizer=tokenizer)
    texts = [tokenizer.decode(ids[0] + ids[1], skip_special_tokens=True), tokenizer.decode(ids[0])]
    measured = fluency(reader, policy, found)
    assert measured[BYTES].tolist() == [len(texts[0].encode()) - len(texts[1].encode())]
    assert measured[NATS].tolist() == pytest.approx([cost.nats for cost in reader.read(texts[1:], texts[:1])])


def test_which_reader_is_loaded(tiny_config, tiny_model, reader):
    task = load_task(tiny_config.task, tiny_config.tokenizer)
    assert isinstance(load_reader(tiny_config, reader.tokenizer, task), TrigramReader) == bool(task.examples("judge"))
    none = SimpleNamespace(examples=lambda split: ())
    assert load_reader(tiny_config, reader.tokenizer, none) is None
    named = changed(tiny_config, compare={"fluency_model": str(tiny_model)})
    assert isinstance(load_reader(named, reader.tokenizer, none), ModelReader)
    assert reader_identity(tiny_config, "x") == "trigrams"
    digest = reader_identity(named, "another").split()[0]
    with pytest.raises(GradeError, match=f"compare.fluency_model={tiny_model} is the policy's base"):
        reader_identity(named, digest)
    with pytest.raises(GradeError, match="compare.fluency_model=.*its context is"):
        reader_identity(changed(named, generation={"max_new_tokens": 100_000}), "x")
    with pytest.raises(GradeError, match="compare.fluency_model=./nowhere cannot be loaded: "):
        reader_identity(changed(tiny_config, compare={"fluency_model": "./nowhere"}), "x")

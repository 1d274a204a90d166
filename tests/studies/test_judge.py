"""The judge: what it learns, what it counts, that it is reproducible and survives a file."""

from __future__ import annotations

import json
import re
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from tiny_run import changed

from grade.config import Config
from grade.errors import GradeError
from grade.studies.compare.final_test import load_judge
from grade.studies.compare.judge import BUCKETS, Judge, ngrams
from grade.studies.compare.judge import train_judge as trained
from grade.studies.compare.measures import judge_rows
from grade.tasks.demo import write_reviews
from grade.tasks.texts import Example

train_judge = partial(trained, least_steps=100)


class Words:
    """A tokenizer that numbers words as they come."""

    all_special_ids, all_special_tokens, added_tokens_decoder, unk_token_id = [], [], {}, None

    def __init__(self):
        self.ids = {}

    def __call__(self, texts, add_special_tokens=False, **_):
        assert not add_special_tokens
        words = [re.findall(r"\w+", text) for text in texts]
        return {"input_ids": [[self.ids.setdefault(word, len(self.ids)) for word in row] for row in words]}


@pytest.fixture(scope="module")
def reviews():
    return write_reviews(1500), write_reviews(200, part="test")


def test_learns_sentiment_of_short_and_long_texts(reviews):
    tokenizer = Words()
    judge, report = train_judge(tokenizer, *reviews, lengths=[45, 30, 45])
    assert list(report["accuracy"]) == ["30 tokens", "45 tokens"]
    assert report["accuracy"]["45 tokens"] > 0.95 and report["accuracy"]["30 tokens"] > 0.8
    assert (report["trained_on"], report["held_out"]) == (1500, 200)
    good, bad = tokenizer(["It is wonderful and superb", "It is terrible and boring"])["input_ids"]
    positive, negative = judge.probability([good, bad])
    assert positive > 0.5 > negative


def test_word_order_matters():
    """Two texts of the same words: only bigrams tell them apart."""
    texts = [Example(f"{i}", "not bad good film" if i % 2 else "not good bad film", i % 2) for i in range(64)]
    _, report = train_judge(Words(), texts, texts[:8], lengths=[4])
    assert report["accuracy"] == {"4 tokens": 1.0}


def test_same_seed_same_weights_and_file(reviews, tmp_path):
    first, again, other = (train_judge(Words(), *reviews, lengths=[45], seed=seed)[0] for seed in (3, 3, 4))
    assert torch.equal(first.bag.weight, again.bag.weight) and torch.equal(first.bias, again.bias)
    assert not torch.equal(first.bag.weight, other.bag.weight)
    first.save(tmp_path / "judge.safetensors")
    rows = [[1, 2, 3], [], [40, 41]]
    assert torch.equal(Judge.load(tmp_path / "judge.safetensors").probability(rows), first.probability(rows))


def test_probability_does_not_depend_on_the_other_rows():
    judge = Judge()
    torch.nn.init.normal_(judge.bag.weight, generator=torch.Generator().manual_seed(0))
    rows = [[5, 6, 5, 6], [], [7], [6, 5, 200_000]]
    together = judge.probability(rows)
    assert together.dtype == torch.float32 and together.shape == (4,)
    torch.testing.assert_close(together, torch.cat([judge.probability([row]) for row in rows]))
    assert together[1] == 0.5  # the bias alone
    assert judge.probability([]).shape == (0,)


def test_ngrams_count_once_and_do_not_cross_rows():
    buckets, counts = ngrams([[5, 0, 5, 0, 5], [5], [], [0]])
    assert counts.tolist() == [4, 1, 0, 1]  # 5, 0, (5, 0), (0, 5); no bigram of two texts
    assert 0 <= int(buckets.min()) and int(buckets.max()) < BUCKETS
    repeated, _ = ngrams([[5, 0, 5, 0, 5, 0, 5, 0]])
    assert torch.equal(repeated, buckets[:4])


def test_the_hash_is_fixed_and_spreads_a_vocabulary():
    """A saved judge must read the same buckets in every process and version; 50,000 tokens as random draws would."""
    assert ngrams([[0, 1]])[0].tolist() == [0, 52668, 155506]
    buckets, _ = ngrams([[token] for token in range(50_000)])
    assert buckets.unique().numel() > 0.98 * BUCKETS * (1 - (1 - 1 / BUCKETS) ** 50_000)


class Letters:
    """Ids 0 to 3: a special token, "a", "b" and "ab", which is how the tokenizer spells those two."""

    all_special_ids, all_special_tokens, added_tokens_decoder, unk_token_id = [0], ["<s>"], {}, None

    def decode(self, ids, skip_special_tokens):
        assert skip_special_tokens
        return "".join(["", "a", "b", "ab"][i] for i in ids)

    def __call__(self, texts, add_special_tokens=False, **_):
        assert not add_special_tokens
        return {"input_ids": [[["", "a", "b", "ab"].index(part) for part in re.findall("ab|a|b", t)] for t in texts]}


def test_the_judge_reads_tokens_as_the_tokenizer_spells_them():
    rollout = SimpleNamespace(
        prompt_ids=torch.tensor([[0, 0, 1], [0, 2, 1]]),
        prompt_mask=torch.tensor([[0, 1, 1], [1, 1, 1]]).bool(),
        tokens=torch.tensor([[2, 1, 2], [1, 0, 2]]),
        mask=torch.tensor([[1, 1, 1], [1, 1, 0]]).bool(),
    )
    assert judge_rows(SimpleNamespace(tokenizer=Letters()), rollout) == [[3, 3], [2, 1, 1]]


INPUTS = {"tokenizer": "t", "judge": "j", "data": "d"}


def test_a_judge_of_other_settings_is_trained_anew(reviews, tmp_path, monkeypatch):
    trained = []
    monkeypatch.setattr(
        "grade.studies.compare.final_test.train_judge",
        lambda *args, **settings: (
            trained.append(settings) or Judge(),
            {"accuracy": {}, "trained_on": 1, "held_out": 1},
        ),
    )
    task, config = SimpleNamespace(examples={"judge": reviews[0], "test": reviews[1]}.get), Config()
    for _ in range(2):
        assert load_judge(tmp_path, config, INPUTS, None, task) is not None
    assert len(trained) == 1
    others = [
        (changed(config, reward={"seed": 7}), INPUTS, task),
        (config, {**INPUTS, "judge": "other reviews"}, task),
        (config, {**INPUTS, "tokenizer": "another of that name"}, task),
        (changed(config, generation={"max_new_tokens": 7}), INPUTS, task),
    ]
    for number, (other, inputs, found) in enumerate(others, start=2):
        load_judge(tmp_path, other, inputs, None, found)
        assert len(trained) == number
    report = json.loads((tmp_path / "judge.json").read_text(encoding="utf-8"))
    assert report["accuracy"] == {} and report["identity"]["lengths"] == trained[-1]["lengths"]
    assert load_judge(tmp_path, config, INPUTS, None, SimpleNamespace(examples={"judge": [], "test": []}.get)) is None
    assert not (tmp_path / "judge.json").exists()


def test_refuses_what_it_cannot_learn_from(reviews, tmp_path):
    train, held_out = reviews
    with pytest.raises(GradeError, match="both classes"):
        train_judge(Words(), [e for e in train if e.label], held_out, lengths=[15])
    with pytest.raises(GradeError, match="policy_examples"):
        train_judge(Words(), train, [], lengths=[15])
    (tmp_path / "other").write_text("no tensors")
    for name in ("other", "missing"):
        with pytest.raises(GradeError, match="holds no judge"):
            Judge.load(tmp_path / name)

"""Heads that learn numbers and pairs, from a task and from one's own data; a classifier of one's own without labels."""

from __future__ import annotations

import json
from dataclasses import replace

import datasets
import pytest
import torch
from prompt_data import chat_tokenizer
from tiny import CONFIGS, base_model, policy_around

from grade.config import RewardConfig, TaskConfig
from grade.errors import GradeError
from grade.model.passes import base_pass, fed_embeddings
from grade.rewards.head_fitting import features_of
from grade.rewards.head_training import HeadTraining, needs_labels
from grade.rewards.loading import load_reward
from grade.rewards.reward_model import RewardModel
from grade.rewards.shared import RewardHead, SharedReward, head_lines
from grade.rollout import Rollout, pad_prompts
from grade.tasks import load_task

SETTINGS = RewardConfig(hidden_size=16, epochs=60, learning_rate=0.02, batch_size=16, max_tokens=24)
TEXTS = [f"{'good ' * (i % 5)}{'bad ' * (4 - i % 5)}{'xyz'[i % 3]}" for i in range(60)]
TARGETS = [100.0 * (i % 5) - 30 for i in range(60)]
PAIRS = [{"prompt": f"Rate {i}: ", "chosen": "it is good", "rejected": "it is bad"} for i in range(40)]


@pytest.fixture(scope="module")
def policy():
    """A tiny Llama whose tokenizer spells."""
    config = CONFIGS["llama"]()
    config.vocab_size, config.eos_token_id, config.max_position_embeddings = 100, 0, 256
    return policy_around(base_model(config), tokenizer=chat_tokenizer())


def given(policy, texts) -> Rollout:
    """Texts as responses to the prompt 'A'."""
    rows = [policy.tokenizer(text)["input_ids"] for text in texts]
    ids, prompt_mask = pad_prompts([policy.tokenizer("A")["input_ids"]] * len(rows), policy.pad_id)
    width = max(map(len, rows))
    tokens = torch.tensor([row + [policy.pad_id] * (width - len(row)) for row in rows])
    mask = torch.arange(width) < torch.tensor([len(row) for row in rows])[:, None]
    support = torch.stack([tokens, (tokens + 1) % 97], -1)
    return Rollout(ids, prompt_mask, tokens, mask, support, torch.ones(tokens.shape), torch.zeros_like(tokens))


def values(policy, reward, texts):
    """(rewards [B], their gradient at the embeddings [B, S, d])"""
    rollout = given(policy, texts)
    x = fed_embeddings(rollout, policy.embedding, policy.embedding_scale).requires_grad_()
    fed = [own.requires_grad_() for own in reward.inputs(rollout)]
    result = reward.value(rollout, base_pass(policy, rollout, x, prompt_cache=False), fed)
    return result.detach(), torch.autograd.grad(result.sum(), fed[0] if fed else x)[0]


def test_numbers_are_learnt_in_their_own_units(policy):
    model = RewardModel(TEXTS, targets=TARGETS, settings=SETTINGS)
    reward = model.fit(policy)
    assert model.report["r2"]["24 tokens"] > 0.8 and model.report["mean_absolute_error"]["24 tokens"] < 60
    assert (model.report["trained_on"], model.report["held_out"]) == (54, 6) and "accuracy" not in model.report
    rewards, gradient = values(policy, reward, ["good good good good x", "bad bad bad bad x"])
    assert rewards[0] > 200 > 100 > rewards[1] and gradient.abs().sum((1, 2)).min() > 0
    assert "R² 0." in head_lines(model.report)[0] and "mean absolute error" in head_lines(model.report)[0]


def test_measures_of_numbers_are_those_of_the_definition(policy):
    """R² and mean absolute error by hand, from features of the held-out texts."""
    model = RewardModel(TEXTS, targets=TARGETS, settings=SETTINGS)
    reward, (_, held_out) = model.fit(policy), model._parts(model.examples)
    rows = [policy.tokenizer(e.text)["input_ids"][:24] for e in held_out]
    estimate = reward.head.reward(features_of(policy, rows, [24], "")[0])
    wanted = torch.tensor([e.label for e in held_out])
    assert model.report["mean_absolute_error"]["24 tokens"] == pytest.approx((estimate - wanted).abs().mean().item())
    r2 = 1 - ((estimate - wanted) ** 2).mean() / wanted.var(correction=0)
    assert model.report["r2"]["24 tokens"] == pytest.approx(r2.item(), abs=1e-5)


@pytest.mark.parametrize("reads", ["prompt+response", "response"])
def test_pairs_rank_the_chosen_answer_higher(policy, reads):
    model = RewardModel(pairs=PAIRS, settings=RewardConfig(**{**vars(SETTINGS), "input": reads}))
    reward = model.fit(policy)
    assert model.report["accuracy"]["24 tokens"] == 1.0 and 0 < model.report["loss"] < 0.3
    rewards, gradient = values(policy, reward, ["it is good", "it is bad"])
    assert 1 > rewards[0] > rewards[1] > 0
    assert gradient.abs().sum((1, 2)).min() > 0
    assert head_lines(model.report) == [
        "held-out share ranked right 1.000 on the first 24 tokens (the length it will judge), 4 pairs"
    ]


def test_the_loss_of_pairs_is_bradley_terry(policy):
    """At a learning rate of 0 the loss is that of the untrained head, pair by pair."""
    settings = RewardConfig(**{**vars(SETTINGS), "learning_rate": 0.0, "epochs": 1})
    model = RewardModel(pairs=PAIRS, settings=settings)
    head = model.fit(policy).head
    learnt, _ = model._parts(model.pairs)
    logits = []
    for which in ("chosen", "rejected"):
        rows = [policy.tokenizer(pair.prompt + getattr(pair, which))["input_ids"] for pair in learnt]
        logits.append(head(features_of(policy, rows, [24], "")[0]))
    expected = torch.log1p(torch.exp(logits[1] - logits[0])).mean()
    assert model.report["loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_labels_and_pairs_of_conversations(policy):
    model = RewardModel(TEXTS, labels=[int(i % 5 > 1) for i in range(60)], settings=SETTINGS)
    assert isinstance(model.fit(policy, judged=12), SharedReward)
    assert set(model.report["accuracy"]) == {"12 tokens", "24 tokens"}
    user = {"role": "user", "content": "Hi?"}
    answers = ({"role": "assistant", "content": text} for text in ("good", "bad"))
    row = dict(zip(("chosen", "rejected"), ([user, answer] for answer in answers), strict=True))
    chats = RewardModel(pairs=[row] * 8, settings=RewardConfig(**{**vars(SETTINGS), "max_tokens": 64}))
    chats.fit(policy)
    assert chats.report["accuracy"]["64 tokens"] == 1.0


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "got no labels: give one of labels, targets, pairs"),
        ({"texts": TEXTS, "labels": [1] * 60, "targets": TARGETS}, "got labels, targets: give one"),
        ({"texts": TEXTS, "labels": [1]}, "got 60 texts and 1 labels"),
        ({"texts": TEXTS, "labels": [2] * 60}, r"labels\[0\] is 2: labels are 0 or 1"),
        ({"texts": TEXTS, "targets": [float("nan")] * 60}, "it must be finite"),
        ({"texts": [None] * 60, "targets": TARGETS}, "text 0 is of type NoneType"),
        ({"pairs": [{"chosen": "a"}]}, r"pairs\[0\] has no 'rejected'"),
        (
            {"pairs": [{"chosen": "a", "rejected": "a"}] * 9},
            r"has 0 usable rows \(9 of 9 pairs have equal answers\): at least 4",
        ),
        ({"texts": TEXTS, "targets": TARGETS, "held_out": 1.0}, "held_out is 1.0"),
    ],
)
def test_data_that_cannot_be_learnt_is_refused(data, message):
    with pytest.raises(GradeError, match=f"RewardModel.*{message}"):
        RewardModel(**data)


def test_fitting_refuses_a_single_label_and_pairs_that_read_the_same(policy):
    with pytest.raises(GradeError, match="have the same label"):
        RewardModel(TEXTS, labels=[1] * 60, settings=SETTINGS).fit(policy)
    long = [{"prompt": "word " * 20, "chosen": "a", "rejected": "b"}] * 8
    with pytest.raises(GradeError, match="no pair of 7 has two answers that differ in their first 24 tokens"):
        RewardModel(pairs=long, settings=SETTINGS).fit(policy)


# --- heads of a task, kept in a folder ---


def task_of(tmp_path, columns, **settings):
    folder = tmp_path / "data"
    folder.mkdir()
    for part in ("train", "test"):
        datasets.Dataset.from_dict(columns).to_parquet(folder / f"{part}.parquet")
    sizes = {"reward_examples": 30, "policy_examples": 15, "validation_examples": 15}
    return TaskConfig(dataset=str(folder), **{**sizes, **settings})


@pytest.mark.parametrize(
    ("name", "columns", "label_type"),
    [
        ("sentiment", {"text": TEXTS, "label": TARGETS}, "numbers"),
        ("prompts", {name: [row[name] for row in PAIRS] for name in PAIRS[0]}, "pairs"),
    ],
)
def test_a_head_of_a_task_is_kept_and_read_again(policy, tmp_path, name, columns, label_type):
    settings = task_of(tmp_path, columns, name=name, label_type=label_type)
    task = load_task(settings)
    training = HeadTraining(SETTINGS, 12, str(tmp_path / "out"), policy, task)
    head = training.head()
    report = json.loads((training.folder / "reward.json").read_text())
    assert report["label_type"] == label_type and head_lines(report)
    found = load_reward(SETTINGS, policy, task, judged=12, output_dir=str(tmp_path / "out"))
    assert found.head.label_type == label_type and torch.equal(found.head.last.weight, head.last.weight)
    assert "estimates" in found.raises if label_type == "numbers" else "prefers" in found.raises
    report["label_type"] = "classes"
    (training.folder / "reward.json").write_text(json.dumps(report))
    with pytest.raises(GradeError, match="has 1 outputs, and reward.json says that it learnt 'classes'"):
        training.head()


def test_a_head_of_pairs_is_known_by_the_ids_that_it_learns(policy, tmp_path):
    columns = {name: [row[name] for row in PAIRS] for name in PAIRS[0]}
    settings = task_of(tmp_path, columns, name="prompts", label_type="pairs")
    swapped = replace(settings, chosen_column="rejected", rejected_column="chosen")
    folders = [HeadTraining(SETTINGS, 12, "out", policy, load_task(s)).folder for s in (settings, settings, swapped)]
    assert folders[0] == folders[1] != folders[2]


def test_prompts_have_nothing_for_a_head_to_learn(policy, tmp_path):
    task = load_task(task_of(tmp_path, {"prompt": TEXTS}, name="prompts"))
    with pytest.raises(GradeError, match="task.name=prompts has no labels here .* reward.path .* reward.model"):
        load_reward(SETTINGS, policy, task, judged=12, output_dir=str(tmp_path))


def test_labels_that_are_no_numbers_are_refused(tmp_path):
    settings = task_of(tmp_path, {"text": ["a", "b"], "label": ["1", "two"]}, label_type="numbers")
    with pytest.raises(GradeError, match="has the label 'two' in row 1, column 'label': .*needs finite numbers"):
        load_task(settings)


# --- a classifier of one's own needs no labels ---


@pytest.mark.parametrize("columns", [{"text": TEXTS}, {"text": TEXTS, "label": [1] * 60}])
def test_texts_without_two_classes_do_where_no_head_is_trained(tmp_path, columns):
    settings = task_of(tmp_path, columns, reward_examples=5000, policy_examples=40)
    reward = RewardConfig(model="a classifier")
    assert not needs_labels(settings, reward) and needs_labels(settings, RewardConfig())
    task = load_task(settings, labels=needs_labels(settings, reward))
    counts = {split: len(task.examples(split)) for split in ("reward", "policy", "validation", "test", "judge")}
    assert counts == {"reward": 5, "policy": 40, "validation": 15, "test": 60, "judge": 0} and task.label_type is None
    assert json.dumps(task.describe())
    with pytest.raises(GradeError, match="label"):
        load_task(settings)


def test_labels_that_are_there_stay_and_the_splits_with_them(tmp_path):
    settings = task_of(tmp_path, {"text": TEXTS, "label": [i % 2 for i in range(60)]}, judge_examples=0)
    assert load_task(settings, labels=False) == load_task(settings)


def test_a_head_that_was_trained_needs_no_labels(tmp_path):
    task, reward = TaskConfig(), RewardConfig(path=str(tmp_path))
    assert needs_labels(task, reward)
    (tmp_path / "head.safetensors").touch()
    assert not needs_labels(task, reward)


def test_only_classes_have_two_outputs():
    for label_type, outputs in RewardHead.OUTPUTS.items():
        head = RewardHead(4, 8, label_type)
        value = head.reward(torch.full((3, 4), 50.0))
        assert head.last.out_features == outputs and value.shape == (3,)

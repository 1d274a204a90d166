"""Rewards that a program brings itself, where they fail, say nothing, or are no longer what they were."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from tiny import TinyTokenizer
from tiny_run import changed, timeless

import grade
from grade.rewards.function import FunctionReward

PROMPTS = ["I watched this film last night.", "We saw it at home.", "This is a comedy.", "It tells the story."]


class Length(grade.RewardFunction):
    def score(self, rollout):
        return rollout.mask.sum(1).float()


class FailsAt(grade.RewardFunction):
    """Length, but for one call, in which it does something else. Calls are its own affair: `_calls`."""

    def __init__(self, call, what):
        self._calls, self._call, self._what = 0, call, what

    def score(self, rollout):
        self._calls += 1
        return self._what(rollout) if self._calls == self._call else rollout.mask.sum(1).float()


def raises(rollout):
    raise ConnectionError("the judge is away")


def leaves(rollout):
    raise SystemExit(3)


@pytest.fixture
def config(tiny_config):
    unnamed = {"name": grade.ModelConfig().name}
    config = changed(tiny_config, task=grade.TaskConfig(), model=unnamed, reward=grade.RewardConfig())
    return changed(config, method={"name": "reinforce"}, evaluation={"batch_size": 8}, train={"save_every": 100})


def make(model, config, reward, **rest):
    return grade.GradeTrainer(model, reward, PROMPTS, config=config, **rest)


@pytest.mark.parametrize(
    ("call", "kept", "what", "words"),
    [
        (3, 1, raises, "failed .ConnectionError: the judge is away"),
        (4, 2, leaves, "failed .SystemExit: 3"),
        (7, 4, lambda rollout: rollout.mask.sum(1) / 0, "gave inf for a response"),
    ],
)  # in the second step, the validation after it, and the last validation
def test_what_was_done_is_kept_where_a_reward_fails(tiny_model, config, tmp_path, call, kept, what, words):
    """The base model's validation is the first call, and validations are made after steps 2 and 4."""
    config = changed(config, train={"steps": 4})
    whole = make(tiny_model, changed(config, train={"run_dir": str(tmp_path / "whole")}), FailsAt(0, what)).train()
    with pytest.raises(grade.GradeError, match=rf"the reward FailsAt {words}.*Kept .*checkpoints/last \(step {kept}\)"):
        make(tiny_model, config, FailsAt(call, what)).train()
    again = make(tiny_model, changed(config, train={"resume": "auto"}), FailsAt(0, what)).train()
    assert timeless(again.metrics) == timeless(whole.metrics)


class Leaves(grade.Callback):
    def on_validation(self, trainer, evaluation):
        raise SystemExit("enough")


def test_nobodys_code_ends_the_program_but_an_interruption_does(tiny_model, config):
    with pytest.raises(grade.GradeError, match="callbacks: Leaves.on_validation raised SystemExit: enough"):
        make(tiny_model, config, Length(), callbacks=[Leaves()]).train()

    def function(completions):
        raise SystemExit

    with pytest.raises(grade.GradeError, match="the reward function function failed .SystemExit"):
        make(tiny_model, config, function).evaluate()

    def factory(policy):
        raise SystemExit(1)

    with pytest.raises(grade.GradeError, match="reward: .*factory ended the program"):
        make(tiny_model, config, factory)

    def interrupted(completions):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(tiny_model, config, interrupted).evaluate()


class Longer(Length):
    """Whether a response is longer than a threshold."""

    def __init__(self, threshold, words=(), scale=1.0):
        self.threshold, self.words, self.scale = threshold, set(words), torch.tensor(scale)
        self.other, self._seen = object(), 0

    def score(self, rollout):
        self._seen += 1
        return self.scale * (super().score(rollout) > self.threshold)


def longer_than(threshold, words=()):
    def longer(completions, factor=1.0):
        return [factor * (len(text) > threshold or text in words) for text in completions]

    return longer


@pytest.mark.parametrize("kind", ["class", "function", "sum"])
def test_a_run_goes_on_with_the_attributes_that_its_reward_had(tiny_model, config, kind):
    made = {"class": Longer, "function": longer_than, "sum": lambda *given: [Longer(*given), longer_than(3)]}[kind]
    make(tiny_model, changed(config, train={"steps": 2}), made(5, ["a", "b"])).train()
    go_on = changed(config, train={"resume": "auto"})
    before = {"class": "Longer.", "function": "longer.", "sum": "Longer: Longer."}[kind]
    words = rf"something else: the reward's {before}threshold \(5 then, 6 now\)\. .*begins with an underscore"
    with pytest.raises(grade.GradeError, match=words):
        make(tiny_model, go_on, made(6, ["a", "b"])).train()
    with pytest.raises(grade.GradeError, match=rf"something else: the reward's {before}words "):
        make(tiny_model, go_on, made(5, ["a"])).train()
    result = make(tiny_model, go_on, made(5, ["b", "a"] if kind != "function" else ["a", "b"])).train()
    assert result.step == 4
    inputs = json.loads((result.run_dir / "run.json").read_text())["inputs"]
    assert inputs[f"the reward's {before}threshold"] == "5" and not any("_seen" in name for name in inputs)


class Fewer(Length):
    """With one attribute or two, as a program may leave one out."""

    def __init__(self, threshold, floor=None):
        self.threshold = threshold
        if floor is not None:
            self.floor = floor


def test_an_attribute_that_is_gone_is_another_reward(tiny_model, config):
    make(tiny_model, changed(config, train={"steps": 2}), Fewer(5, floor=1)).train()
    go_on = changed(config, train={"resume": "auto"})
    with pytest.raises(grade.GradeError, match=r"the reward's Fewer.floor \(1 then, nothing now\)"):
        make(tiny_model, go_on, Fewer(5)).train()


def test_a_run_of_a_version_that_kept_no_attributes_goes_on(tiny_model, config, monkeypatch):
    monkeypatch.setattr(Fewer, "attributes", lambda self: {})
    result = make(tiny_model, changed(config, train={"steps": 2}), Fewer(5)).train()
    monkeypatch.undo()
    assert not any("Fewer" in name for name in json.loads((result.run_dir / "run.json").read_text())["inputs"])
    assert make(tiny_model, changed(config, train={"resume": "auto"}), Fewer(5)).train().step == 4


def test_attributes_that_differ_between_processes_are_told_so(tiny_model, config, monkeypatch):
    """Either way round: of a process that has one more, and of one that lacks one."""
    for other, words in (
        ({"the reward's Fewer.threshold": "6"}, r"threshold \(in the main process 5, in process 1 6\)"),
        ({"the reward's Fewer.url": '"a"'}, r'url \(in the main process nothing, in process 1 "a"\)'),
    ):
        monkeypatch.setattr(
            "grade.training.setup.everywhere", lambda _, inputs, other=other: [inputs, {**inputs, **other}]
        )
        with pytest.raises(
            grade.GradeError, match=rf"do not have the same inputs.*the reward's Fewer.{words}\. .*under"
        ):
            make(tiny_model, config, Fewer(5)).train()
    monkeypatch.setattr(
        "grade.training.setup.everywhere", lambda _, inputs: [{**inputs, "the reward's X.a": "1"}, inputs]
    )
    with pytest.raises(grade.GradeError, match=r"the reward's X.a \(in the main process 1, in process 1 nothing\)"):
        make(tiny_model, config, Fewer(5)).train()


def test_attributes_are_told_by_what_they_say():
    def told(reward):
        return FunctionReward(reward, TinyTokenizer()).attributes() if callable(reward) else reward.attributes()

    assert told(Longer(1))["Longer.scale"] != told(Longer(1, scale=2.0))["Longer.scale"]
    assert set(told(Longer(1))) == {"Longer.threshold", "Longer.words", "Longer.scale"}
    assert told(partial(longer_than(4), factor=2.0)) == {
        "partial.threshold": "4",
        "partial.words": "[]",
        "partial.factor": "2.0",
    }
    assert told(Longer(1, ["word" * 50]))["Longer.words"].startswith("SHA-256 ")
    assert Longer(1).identity().count("test_own_rewards.") == 2  # what it derives from counts


def test_a_reward_that_applies_to_nothing_is_told_and_ends_the_run(tiny_model, config, capfd):
    def solved(completions):
        return [None for _ in completions]

    config = changed(config, train={"steps": 7}, evaluation={"every": 100})
    with pytest.raises(grade.GradeError, match=r"no response of 5 steps in a row \(solved\).*last \(step 4\)"):
        make(tiny_model, config, solved).train()
    said = capfd.readouterr().err
    assert said.count("the reward function solved applies to no response of a step, and counts as 0") == 1
    assert said.count("the reward function solved applies to no response of the validation prompts") == 1
    config = changed(config, train={"run_dir": f"{config.train.run_dir}-sum"})
    assert make(tiny_model, config, [Length(), solved]).train().step == 7  # it is one of two
    assert capfd.readouterr().err.count("applies to no response of a step") == 1


def test_the_head_of_a_reward_model_is_recorded(tiny_model, config):
    texts = [f"{prompt} The plot was {word}." for prompt in PROMPTS for word in ("great", "awful")]
    settings = grade.RewardConfig(epochs=2, hidden_size=8, max_tokens=32)
    config = changed(config, train={"steps": 1})
    result = make(tiny_model, config, grade.RewardModel(texts, labels=[1, 0] * 4, settings=settings)).train()
    head = json.loads((result.run_dir / "run.json").read_text())["reward_head"]
    assert head["label_type"] == "classes" and len(head["sha256"]) == len(head["data"]["sha256"]) == 64
    assert f"sha256 {head['sha256']}" in (result.run_dir / "checkpoints" / "last" / "README.md").read_text()
    go_on = changed(config, train={"resume": "auto", "steps": 2})
    with pytest.raises(grade.GradeError, match="something else: the reward"):
        make(tiny_model, go_on, grade.RewardModel(texts, labels=[0, 1] * 4, settings=settings)).train()


def test_pairs_with_equal_answers_are_called_so():
    pair = {"prompt": "a", "chosen": "good", "rejected": "good"}
    with pytest.raises(grade.GradeError, match="0 usable rows .5 of 5 pairs have equal answers"):
        grade.RewardModel(pairs=[pair] * 5)
    with pytest.raises(grade.GradeError, match="1 usable rows .4 of 5 texts are empty"):
        grade.RewardModel(["a", "", " ", "", ""], labels=[0, 1, 0, 1, 0])

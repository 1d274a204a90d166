"""Rewards that a program brings itself, where they fail, say nothing, or are no longer what they were."""

from __future__ import annotations

import json

import pytest
from tiny_run import adapter_of, changed, timeless

import grade

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

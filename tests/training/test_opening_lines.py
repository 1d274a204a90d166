"""What a run says before its first step, and after its first evaluation."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

from tiny import tiny_policy
from tiny_run import with_train

from grade.commands.train import train
from grade.config import Config
from grade.tasks.texts import Labels
from grade.training.opening_lines import opening_lines
from grade.training.progress import training_progress


def test_what_is_raised_is_said_for_every_kind_of_reward():
    config, policy = Config(), tiny_policy()
    labels = Labels("stars", "5", "1", {"3": 7})
    head, program = SimpleNamespace(differentiable=True), SimpleNamespace(differentiable=False)
    own = SimpleNamespace(differentiable=True, raises="the probability (by softmax) of the class 'good'")

    def first(config, task, reward):
        return opening_lines(config, task, policy, reward)[0]

    assert first(config, SimpleNamespace(labels=labels), head) == (
        "reward: the probability of the label '5' of column 'stars' (negative: '1'; rows left out: 7 with '3') "
        "is raised"
    )
    assert first(config, SimpleNamespace(), head) == "reward: the probability of a positive review is raised"
    with_model = replace(config, reward=replace(config.reward, model="some/classifier"))
    assert first(with_model, SimpleNamespace(labels=labels), own) == f"reward: {own.raises} is raised"
    puzzles = replace(config, task=replace(config.task, name="countdown"))
    assert first(puzzles, SimpleNamespace(), program) == "reward: the score of task.name=countdown is raised"


def test_trusted_code_is_announced():
    config, policy, head = Config(), tiny_policy(), SimpleNamespace(differentiable=True)
    assert len(opening_lines(config, SimpleNamespace(), policy, head)) == 2
    config.model.trust_remote_code = True
    assert "code that comes with Qwen/Qwen3-4B" in opening_lines(config, SimpleNamespace(), policy, head)[2]


def test_what_looks_like_a_tag_is_shown(capsys):
    with training_progress(1, 0, enabled=True) as progress:
        progress.say("a response ends with '[/INST]' or '[SEP]'")
    assert "'[/INST]' or '[SEP]'" in capsys.readouterr().err


def test_a_run_says_it(tiny_config, capsys):
    """Responses of two tokens: none of them ends, which is said once, after the first validation."""
    short = replace(tiny_config.generation, max_new_tokens=2, min_new_tokens=2)
    few = replace(tiny_config.evaluation, validation_prompts=2, test_prompts=0, every=1)
    train(with_train(replace(tiny_config, generation=short, evaluation=few), steps=1, tensorboard=False))
    said = " ".join(capsys.readouterr().err.split())
    assert said.index("reward: the probability of the label '1' of column 'label' (negative: '0') is raised") < (
        said.index("a response ends with")
    )
    assert said.count("warning: no response of the first validation ended by itself") == 1

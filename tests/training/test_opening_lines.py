"""What a run says before its first step, and after its first evaluation."""

from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
from tiny import tiny_policy
from tiny_run import with_train

from grade.commands.train import train
from grade.config import Config, GenerationConfig, TrainConfig
from grade.training.opening_lines import opening_lines, step_line
from grade.training.progress import training_progress


def test_a_reward_says_what_is_raised_and_trusted_code_is_announced():
    config, policy = Config(), tiny_policy()
    reward = SimpleNamespace(raises="the score")

    def lines():
        return opening_lines(config.model, config.train, config.generation, policy, reward)

    assert lines()[0] == "reward: the score is raised" and len(lines()) == 3
    config.model.trust_remote_code = True
    assert "code that comes with Qwen/Qwen3-0.6B" in lines()[3]


@pytest.mark.parametrize(
    "train, samples, processes, line",
    [
        (
            {},
            1,
            1,
            "a step: 16 prompts × 1 sample = 16 responses (train.batch_size 16 × train.accumulation_steps 1), 1,024 "
            "tokens at most",
        ),
        (
            {"batch_size": 8, "accumulation_steps": 64},
            4,
            2,
            "a step: 256 prompts × 4 samples = 1,024 responses "
            "(train.batch_size 8 × train.accumulation_steps 64 × 2 processes), 65,536 tokens at most",
        ),
    ],
)
def test_what_a_step_is(train, samples, processes, line):
    config = Config(train=TrainConfig(**train), generation=GenerationConfig(samples_per_prompt=samples))
    assert step_line(config.train, config.generation, processes) == line


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
    judged = r"reward head: held-out accuracy [01]\.\d{3} on the first \d+ tokens \(the length it will judge\), 30 "
    assert re.search(judged, said)
    assert said.count("warning: no response of the first validation ended by itself") == 1

"""What a run says before its first step, and after its first evaluation."""

from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace

from tiny import tiny_policy
from tiny_run import with_train

from grade.commands.train import train
from grade.config import Config
from grade.training.opening_lines import opening_lines
from grade.training.progress import training_progress


def test_a_reward_says_what_is_raised_and_trusted_code_is_announced():
    config, policy = Config(), tiny_policy()
    reward = SimpleNamespace(raises="the score")
    assert opening_lines(config, policy, reward)[0] == "reward: the score is raised"
    assert len(opening_lines(config, policy, reward)) == 2
    config.model.trust_remote_code = True
    assert "code that comes with Qwen/Qwen3-4B" in opening_lines(config, policy, reward)[2]


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
    judged = r"reward head: held-out accuracy on the first \d+ tokens \(the length it will judge\): [01]\.\d{3} of 30"
    assert re.search(judged, said)
    assert said.count("warning: no response of the first validation ended by itself") == 1

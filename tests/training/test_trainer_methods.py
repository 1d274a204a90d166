"""The trainer's invariants with PPO, REINFORCE and GRPO: what holds for GRADE holds for them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_run import adapter_of, stopped_after, timeless, trainer_of, with_train

from grade.commands.train import train
from grade.config import validate
from grade.config.methods import PPOConfig, ReinforceConfig
from grade.errors import GradeError
from grade.model.checkpoint import load_state
from grade.processes import make_accelerator
from grade.training.evaluation import Evaluation
from grade.training.run_folder import adapter_folder, is_finished, prepare_run_dir
from grade.training.trainer import Trainer


def config_of(tiny_config, name, section=None, **changes):
    """The tiny config with another method, in groups of two."""
    method = replace(tiny_config.method, name=name)
    if section:
        method = replace(method, **{name: replace(getattr(method, name), **section)})
    config = replace(
        tiny_config, method=method, generation=replace(tiny_config.generation, samples_per_prompt=2), **changes
    )
    validate(config)
    return config


VARIANTS = {
    "ppo": ("ppo", {}),
    "ppo, exact KL in the loss": ("ppo", {"kl": "loss", "whiten_advantages": False, "gamma": 0.99}),
    "reinforce": ("reinforce", {}),
    "rloo": ("reinforce", {"baseline": "leave_one_out"}),
    "no baseline": ("reinforce", {"baseline": "none"}),
    "grpo": ("grpo", {}),
    "grpo, two passes": ("grpo", {"epochs": 2, "minibatches": 2, "loss_reduction": "sequence_mean"}),
    "grpo, tokens": ("grpo", {"level": "token", "entropy_reward_coef": 0.1, "kl_ref_policy_coef": 0.02}),
    "dr. grpo": ("grpo", {"advantage_scale": "none", "loss_reduction": "constant"}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_method_takes_a_step(tiny_config, variant):
    name, section = VARIANTS[variant]
    trainer = trainer_of(config_of(tiny_config, name, section))
    before = adapter_of(trainer.policy)
    metrics = trainer.train_step()
    assert 0 < metrics["grad_norm"] < 100 and 0 < metrics["reward"] < 1 and metrics["kl"] < 1e-2
    assert metrics["objective/kl"] == metrics["kl_sequence"]
    assert {"seconds/rollout", "seconds/score", "seconds/backward", "seconds/update"} <= set(metrics)
    assert not torch.equal(before, adapter_of(trainer.policy))


@pytest.mark.parametrize("name, section", [("ppo", {"value_learning_rate": 0.01}), ("reinforce", {})])
def test_a_resumed_run_repeats_the_uninterrupted_one(tiny_config, tmp_path, name, section):
    """Exactly: value head, moving average, optimizer groups and the order of mini-batches."""
    config = config_of(tiny_config, name, section)
    config = replace(config, evaluation=replace(config.evaluation, every=4, test_prompts=0, validation_prompts=4))
    config = with_train(config, steps=4, save_every=2, tensorboard=False)
    whole, stopped = (with_train(config, run_dir=str(tmp_path / folder)) for folder in ("whole", "stopped"))
    assert train(whole) == {} and is_finished(Path(whole.run_dir), whole.train.steps, whole.evaluation)
    stopped_after(stopped)
    assert not is_finished(Path(stopped.run_dir), stopped.train.steps, stopped.evaluation)
    train(with_train(stopped, resume=True))

    logs = [timeless(tmp_path / folder / "metrics.jsonl") for folder in ("whole", "stopped")]
    assert logs[0] == logs[1]
    states = [load_state(tmp_path / folder / "checkpoints" / "last")["method"] for folder in ("whole", "stopped")]
    assert states[0].keys() == states[1].keys() and len(states[0]) == 2
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]) if torch.is_tensor(value) else value == states[1][key]
    with pytest.raises(GradeError, match="nothing left to do"):
        prepare_run_dir(with_train(stopped, resume=True))


def test_adapters_of_every_validation_are_kept(tiny_config):
    config = with_train(config_of(tiny_config, "reinforce"), steps=2, keep_adapters=True)
    config = replace(config, evaluation=replace(config.evaluation, every=1, test_prompts=0, validation_prompts=2))
    trainer = Trainer(config, make_accelerator(config), prepare_run_dir(config))
    trainer.fit()
    assert [(adapter_folder(trainer.run_dir, step) / "adapter_config.json").is_file() for step in (1, 2)] == [True] * 2


def test_the_solve_rate_chooses_where_there_is_one():
    row = Evaluation(
        split="validation",
        step=1,
        model="policy",
        reward=0.5,
        reward_stderr=0,
        kl=0,
        kl_sequence=0,
        entropy=0,
        unique_token_ratio=0,
        mean_length=1,
        eos_rate=1,
        prompts=1,
    )
    assert row.metric == 0.5
    row.details["solve_rate"] = 0.25
    assert row.metric == 0.25 and row.summary()["solve_rate"] == 0.25


@pytest.mark.parametrize(
    "changes, train, words",
    [
        ({"name": "grpo"}, {}, "generation.samples_per_prompt is 1"),
        ({"name": "ppo", "kl_direction": "ref_policy"}, {}, "method.ppo.kl=reward"),
        ({"estimator": "reinmax", "tau_end": 0.5}, {}, "method.tau_end is 0.5, but method.estimator=reinmax"),
        ({"name": "ppo", "ppo": PPOConfig(minibatches=3)}, {}, "method.ppo.minibatches .3. does not divide the 4"),
        (
            {"name": "reinforce", "reinforce": ReinforceConfig(baseline="leave_one_out")},
            {"batch_size": 1},
            "leave_one_out needs other responses",
        ),
    ],
)
def test_what_a_method_cannot_do_is_refused(tiny_config, changes, train, words):
    with pytest.raises(GradeError, match=words):
        validate(with_train(replace(tiny_config, method=replace(tiny_config.method, **changes)), **train))

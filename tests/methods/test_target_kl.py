"""`method.target_kl` moves the weight of the KL until the KL is where it should be."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from enumeration import method_of, ragged_rollout, step_gradients
from tiny import tiny_policy, tiny_reward
from tiny_run import changed, stopped_after, timeless, with_train

from grade.commands.train import train
from grade.methods.base import steered


def test_the_coefficient_follows_the_relative_excess_within_a_fifth():
    assert steered(0.1, 0.55, 0.5, 0.1) == pytest.approx(0.1 * 1.01)
    assert steered(0.1, 0.45, 0.5, 0.1) == pytest.approx(0.1 * 0.99)
    assert steered(0.1, 5.0, 0.5, 0.5) == pytest.approx(0.1 * 1.1)
    assert steered(0.1, 0.0, 0.5, 0.5) == pytest.approx(0.1 * 0.9)
    assert steered(0.1, 0.5, 0.5, 1.0) == 0.1
    assert steered(1e-9, 0.0, 0.5, 1.0) == 1e-9 and steered(1e6, 5.0, 0.5, 1.0) == 1e6  # and no further


def test_the_optimum_of_a_steered_objective_has_the_target():
    """Two actions under the reward x and a uniform reference, whose optimum for each coefficient is known."""

    def kl_of(coefficient):
        p = 1 / (1 + torch.tensor(-1 / coefficient, dtype=torch.float64).exp())
        return float(p * (2 * p).log() + (1 - p) * (2 * (1 - p)).log())

    coefficient = 0.1
    for _ in range(400):
        coefficient = steered(coefficient, kl_of(coefficient), 0.2, 0.1)
    assert kl_of(coefficient) == pytest.approx(0.2, rel=1e-6)


@pytest.mark.parametrize(
    "name, own, accumulation",
    [
        ("grade-ste", None, 1),
        ("grade-ste", None, 2),
        ("ppo", None, 1),
        ("ppo", {"kl": "loss"}, 1),
        ("ppo", {"kl": "loss"}, 2),
        ("reinforce", None, 1),
        ("grpo", None, 2),
    ],
)
@pytest.mark.parametrize("reduction, seen", [("token_mean", "kl"), ("sequence_sum", "kl_sequence")])
def test_every_method_is_charged_what_the_coefficient_has_become(name, own, accumulation, reduction, seen):
    """A step with a coefficient that has moved is a step of a method that was given it."""
    policy = tiny_policy("llama", dtype=torch.float64)
    reward, rollout = tiny_reward(policy), ragged_rollout(policy)
    batch = len(rollout) // accumulation
    options = dict(batch=batch, accumulation=accumulation, copies=4, kl_reduction=reduction, own=own)
    moved = method_of(policy, reward, name, target_kl=0.01, target_kl_rate=1.0, **options)
    _, metrics = step_gradients(moved, rollout)
    assert moved.steer(metrics) == {"kl_coef": 0.1}
    assert moved.kl_coef == pytest.approx(steered(0.1, metrics[seen], 0.01, 1.0)) != 0.1
    given = method_of(policy, reward, name, kl_coef=moved.kl_coef, **options)
    unmoved = method_of(policy, reward, name, **options)
    for method in (given, unmoved):
        method.load_state_dict(deepcopy(moved.state_dict()))
    ours, metrics = step_gradients(moved, rollout)
    theirs, expected = step_gradients(given, rollout)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert metrics["loss"] == expected["loss"]
    assert not all(torch.equal(a, b) for a, b in zip(ours, step_gradients(unmoved, rollout)[0], strict=True))
    assert given.steer(expected) == {}


def test_a_resumed_run_goes_on_with_its_coefficient(tiny_config, tmp_path):
    config = changed(tiny_config, method={"target_kl": 1e-3, "target_kl_rate": 1.0}, train={"steps": 3})
    train(with_train(config, run_dir=str(tmp_path / "whole")))
    stopped = with_train(config, run_dir=str(tmp_path / "stopped"))
    stopped_after(stopped)
    train(with_train(stopped, resume=True))
    whole = timeless(tmp_path / "whole" / "metrics.jsonl")
    assert timeless(tmp_path / "stopped" / "metrics.jsonl") == whole
    assert len({row["kl_coef"] for row in whole if "kl_coef" in row}) == 3

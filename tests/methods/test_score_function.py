"""Functions beside a reward with a gradient: their gradient is exact in expectation, and leaves the other as it is."""

from __future__ import annotations

import math

import pytest
import torch
from enumeration import (
    PROMPT,
    RAGGED,
    draws,
    full_terms,
    given_rollout,
    method_of,
    padded,
    step_gradients,
    symbol_policy,
)
from published import gradients, relative_error
from rollouts import draw
from tiny import KeepDouble, tiny_policy, tiny_reward

from grade.errors import GradeError
from grade.methods.score_function import advantages
from grade.rewards.base import RewardFunction
from grade.rewards.weighted import Term, WeightedReward

WEIGHT, SCALE, OFFSET = 0.6, 2.0, 0.25


class Ones(RewardFunction):
    """A number that follows from tokens and length; `silent` of a response with that many ones."""

    def __init__(self, silent=None):
        self.silent = silent

    def score(self, rollout):
        ones, length = (rollout.tokens * rollout.mask).sum(1), rollout.mask.sum(1)
        value = torch.sin(1.0 + ones.double()) + 0.3 * length
        return value if self.silent is None else torch.where(ones == self.silent, torch.nan, value)


def mixed(policy, weight=WEIGHT, silent=None):
    head = Term(tiny_reward(policy), "model")
    return WeightedReward([head, Term(Ones(silent), "ones", weight, SCALE, OFFSET)])


def settings(**changes):
    return dict(kl_coef=0.3, tau_start=1.5, tau_end=1.5, estimator="rao", rao_samples=2, hop_tol=0.0, **changes)


@pytest.mark.parametrize(("count", "copies"), [(1, 1), (2, 1), (2, 2), (3, 3)])
@pytest.mark.parametrize("silent", [None, 1])
def test_the_expected_gradient_of_a_function_is_exact(count, copies, silent):
    """Against the derivative of the sum over all responses, for every baseline, also of a function that does not apply
    to some responses: those have 0 from it. What the differentiable part adds is taken away, draw by draw."""
    with KeepDouble():
        policy = symbol_policy(symbols=2)
        tokens, mask = padded(RAGGED)
        whole = given_rollout(policy, tokens, mask=mask)
        probability = full_terms(policy, whole).logprob.sum(1).exp()
        value = WEIGHT * (SCALE * Ones(silent).score(whole) + OFFSET)
        (-(probability * value.nan_to_num(0.0)).sum()).backward()
        exact = gradients(policy)
        found = 0.0
        with_function, without = (
            method_of(policy, reward, "grade-ste", batch=count, copies=copies, **settings())
            for reward in (mixed(policy, silent=silent), tiny_reward(policy))
        )
        for group, orders in draws(count, len(RAGGED)):
            longest = int(mask[group].sum(1).max())
            rollout = given_rollout(policy, tokens[group, :longest], copies, mask=mask[group, :longest])
            (both,), _ = step_gradients(with_function, rollout)
            (alone,), _ = step_gradients(without, rollout)
            found = found + orders * math.prod(probability[i].item() for i in group) * (both - alone)
    assert exact.norm() > 0.01 and relative_error(found, exact) < 1e-11


@pytest.fixture(scope="module")
def sampled():
    policy = tiny_policy(dtype=torch.float64)
    return policy, draw(policy, [PROMPT, [7, 11, 13]], copies=4, max_new_tokens=6, min_new_tokens=2)


@pytest.mark.parametrize("name", ["grade", "grade-ste"])
def test_a_weight_of_zero_leaves_the_gradient_as_it_is_to_the_bit(name):
    policy = tiny_policy()
    options = {**settings(), "estimator": "gumbel"}
    methods = [
        method_of(policy, reward, name, batch=4, copies=2, **options)
        for reward in (tiny_reward(policy), mixed(policy, weight=0.0), mixed(policy))
    ]
    rollout = draw(policy, copies=2, max_new_tokens=6, tau=1.5, soft=name == "grade")
    (alone,), (zero,), (other,) = (step_gradients(method, rollout)[0] for method in methods)
    assert torch.equal(alone, zero) and not torch.equal(alone, other)


def test_micro_batches_change_nothing(sampled):
    """Groups may be split: the baseline is taken before."""
    policy, rollout = sampled
    found = []
    for batch in (8, 3, 1):
        (gradient,), metrics = step_gradients(
            method_of(policy, mixed(policy), "grade-ste", batch=batch, copies=4, **settings()), rollout
        )
        found.append((gradient, metrics["rewards/ones/mean"], metrics["rewards/ones/std"], metrics["reward"]))
    for gradient, *metrics in found[1:]:
        assert relative_error(gradient, found[0][0]) < 1e-12
        assert metrics == pytest.approx(found[0][1:], rel=1e-12)
    values = Ones().score(rollout)
    assert found[0][1] == pytest.approx(values.mean().item()) and found[0][2] == pytest.approx(values.std().item())


@pytest.mark.parametrize("copies", [1, 2])
def test_processes_change_nothing(copies):
    """Two that have half of the responses each give what one gives."""
    shares = torch.tensor([[1.0, 2.0], [4.0, torch.nan], [0.5, 1.0], [2.0, 7.0]], dtype=torch.float64)
    whole, asked = advantages(shares, copies, lambda x: x), []

    def reduce(x):  # each half hears the sum of both in the order in which they ask
        others = shares.view(2, 2, 2)[1 - len(asked) // 2]
        asked.append(x)
        return x + (others.nan_to_num(0.0) if len(asked) % 2 else (~others.isnan()).double()).sum(0)

    halves = torch.cat([advantages(half, copies, reduce) for half in shares.view(2, 2, 2)])
    torch.testing.assert_close(halves, whole, rtol=0, atol=1e-14)
    assert len(asked) == (4 if copies == 1 else 0)


def test_a_reward_without_a_gradient_is_refused(sampled):
    policy, _ = sampled
    with pytest.raises(GradeError, match="method.name=grade backpropagates the reward, and the reward has no gradient"):
        method_of(policy, WeightedReward([Term(Ones(), "ones")]), "grade", batch=2)


def test_functions_are_asked_once_a_step(sampled):
    policy, rollout = sampled
    asked = []

    class Counted(Ones):
        def score(self, rollout):
            asked.append(len(rollout))
            return super().score(rollout)

    for name in ("grade-ste", "reinforce", "grpo", "ppo"):
        reward = WeightedReward([Term(tiny_reward(policy), "model"), Term(Counted(), "ones")])
        step_gradients(method_of(policy, reward, name, batch=2, accumulation=4, copies=4), rollout)
    assert asked == [8] * 4


def test_every_method_sees_the_same_sum(sampled):
    policy, rollout = sampled
    reward, found = mixed(policy, silent=2), {}
    for name in ("grade-ste", "reinforce", "grpo", "ppo"):
        _, metrics = step_gradients(method_of(policy, reward, name, batch=8, copies=4), rollout)
        found[name] = [metrics[k] for k in ("reward", "reward_std", "rewards/model/mean", "rewards/ones/mean")]
    for values in found.values():
        assert values == pytest.approx(found["grade-ste"], rel=1e-6)

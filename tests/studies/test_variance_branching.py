"""Responses that share a prefix: what they have in common, and that their products are those of whole responses."""

from __future__ import annotations

import pytest
import torch
from tiny import KeepDouble

from benchmarks.estimator_problem import PROMPT, Problem, network_reward, symbol_policy
from benchmarks.estimators import logits_of_every_response, step_products
from grade.config import GenerationConfig, MethodConfig, TrainConfig
from grade.methods import make_method
from grade.methods.services import Services
from grade.replay.replay import ReplaySettings
from grade.sampling.draw import Sampling
from grade.studies.variance import branching
from grade.studies.variance.branching import branched, measured, prefix_lengths
from grade.studies.variance.steps import Products

LENGTH, KL_COEF = 3, 0.2


@pytest.fixture(autouse=True)
def double():
    with KeepDouble():
        yield


@pytest.fixture
def problem():
    policy = symbol_policy(4, 1.0, 0)
    policy.eos_ids = policy.eos_ids[:0]  # every symbol can be drawn at every step
    return Problem(policy, network_reward(policy, LENGTH, 0), LENGTH, KL_COEF)


def sampling(length=LENGTH):
    return Sampling(max_new_tokens=length, min_new_tokens=length, top_k=4)


def method_of(problem, **settings):
    return make_method(
        problem.policy,
        problem.reward,
        MethodConfig(name="grade-ste", **settings),
        GenerationConfig(max_new_tokens=LENGTH, min_new_tokens=LENGTH, top_k=4),
        TrainConfig(),
        Services(),
        seed=0,
        activation_checkpointing=False,
    )


@pytest.mark.parametrize("at", range(LENGTH))
def test_responses_of_a_prefix(problem, at):
    ids = torch.tensor([PROMPT, [1, 1]])
    mask = torch.ones_like(ids, dtype=torch.bool)
    rollout = branched(problem.policy, ids, mask, sampling(), at=at, copies=6, seed=5, first_row=100)
    assert rollout.tokens.shape == (12, LENGTH) and rollout.prompt_ids.tolist() == [PROMPT] * 6 + [[1, 1]] * 6
    by_prompt = rollout.tokens.unflatten(0, (2, 6))
    assert (by_prompt[:, :, :at] == by_prompt[:, :1, :at]).all()
    assert len(rollout.rows[:, at].unique()) == 12 and rollout.rows.min() >= 100
    assert rollout.rows.max() < 100 + 2 * 7 * LENGTH
    indices = rollout.indices.unflatten(0, (2, 6))[:, :, at]
    assert (indices == indices[:, :1]).all()
    again = branched(problem.policy, ids, mask, sampling(), at=at, copies=6, seed=5, first_row=100)
    assert (again.tokens == rollout.tokens).all()


def test_tokens_follow_the_policy(problem):
    """Whole responses, whatever their prefix's length, have the policy's distribution."""
    ids = torch.tensor([PROMPT]).expand(2000, -1)
    mask = torch.ones_like(ids, dtype=torch.bool)
    place = torch.tensor([16, 4, 1])
    probability = problem.probability()
    for at in range(LENGTH):
        tokens = branched(problem.policy, ids, mask, sampling(), at=at, copies=2, seed=at, first_row=0).tokens[::2]
        counts = torch.bincount((tokens * place).sum(1), minlength=64)
        expected = 2000 * probability
        assert ((counts - expected) ** 2 / expected.clamp_min(1e-9))[expected > 1].sum() < 110  # of 63 degrees at most


def test_prefixes_have_every_length():
    lengths = prefix_lengths(5, seed=3)
    drawn = [next(lengths) for _ in range(15)]
    assert sorted(drawn) == sorted(list(range(5)) * 3) and drawn[:5] != drawn[5:10]


def test_products_are_those_of_the_exact_gradient(problem, monkeypatch):
    """Of `straight_through`, by sampling and by enumeration, within 5 standard errors; KL to later tokens included."""
    monkeypatch.setattr(branching, "COPIES", 64)
    method = method_of(problem, kl_coef=KL_COEF, kl_reduction="sequence_sum")
    rule = ("straight_through", 1.0)
    found = [f for f in measured(method, [PROMPT], [rule], prefixes=90, seed=1)]
    exact = problem.exact_at_logits()
    options = ReplaySettings(tau=1.0, estimator="straight_through", max_hops=LENGTH - 1, hop_tol=0.0)
    expected = step_products(problem, exact, logits_of_every_response(problem, options))
    expected = Products(*(value / LENGTH for value in expected))  # there a sum over steps
    for key, of in ((rule, expected), (None, None)):
        values = torch.stack([torch.stack(f[key]).squeeze(1) for f in found])  # [prefixes, products]
        error = values.std(0) / len(values) ** 0.5
        for name, mean, spread in zip(Products._fields, values.mean(0), error, strict=True):
            wanted = getattr(expected, name) if of is not None else None
            if name == "best" or (of is None and name in ("natural_gain", "natural_size")):
                wanted = expected.best
            if wanted is not None:
                assert abs(mean - wanted) < 5 * spread + 1e-12, name


def test_a_mean_over_tokens_is_a_sum_over_them_with_a_share_of_the_weight(problem):
    """Of responses of one length, in every product: at the token's own step, after it, and in the gradients."""
    rules = [("straight_through", 1.0), ("gumbel", 0.5)]
    mean = method_of(problem, kl_coef=KL_COEF, kl_reduction="token_mean")
    total = method_of(problem, kl_coef=KL_COEF / LENGTH, kl_reduction="sequence_sum")
    other = method_of(problem, kl_coef=KL_COEF, kl_reduction="sequence_sum")
    found, same, different = (
        [torch.stack(of[rule]) for of in measured(m, [PROMPT], rules, prefixes=3, seed=1) for rule in (*rules, None)]
        for m in (mean, total, other)
    )
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(found, same, strict=True))
    assert not all(torch.allclose(a, b, rtol=1e-3) for a, b in zip(found, different, strict=True))

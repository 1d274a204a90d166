"""The estimators through `replay`, where every response can be enumerated: what they share, and when they are exact.

With J(q) v = q * (v - <q, v>) and one token drawn from pi, the exact gradient at the logits is J(pi) u for the values
u_j = r(E_j). `straight_through` has v_j = <r'(E_y), E_j>, which is u up to a constant where r is linear. The mean of
`reinmax` at tau 1 over tokens is pi_i sum_j pi_j (r'(E_i) + r'(E_j)) (E_i - E_j) / 2, the trapezoidal rule for
r(E_i) - r(E_j), exact up to quadratic r. `gumbel` is the gradient of E <w, v>, w the relaxed weights.
"""

from __future__ import annotations

import pytest
import torch
from published import gradients, relative_error
from tiny import KeepDouble

from benchmarks.estimator_problem import EmbeddingReward, Problem, network_reward, symbol_policy
from benchmarks.estimators import (
    at_every_response,
    drawn_products,
    enumerated,
    logits_of_every_response,
    reinforce,
    sampled,
    score_at_logits,
    step_products,
)
from grade.replay.replay import ReplaySettings, replay
from grade.studies.variance.steps import shares
from grade_kernels.common.random import gumbel

ESTIMATORS = ["gumbel", "rao", "straight_through", "reinmax"]


@pytest.fixture(autouse=True)
def double():
    with KeepDouble():
        yield


def settings(estimator, tau=1.0, hops=8, samples=16):
    return ReplaySettings(tau=tau, estimator=estimator, rao_samples=samples, max_hops=hops, hop_tol=0.0)


def problem_of(length=3, *, symbols=4, spread=1.0, kl_coef=0.2, function=None, seed=0):
    """The network's reward, or `function` of the embeddings [B, S, d]."""
    policy = symbol_policy(symbols, spread, seed)
    reward = EmbeddingReward(policy, function) if function else network_reward(policy, length, seed)
    return Problem(policy, reward, length, kl_coef)


def direction(seed=0):
    return torch.randn(16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def linear(position):
    return lambda x: x[:, position] @ direction()


def quadratic(x):
    return x[:, 0] @ direction(0) + (x[:, 0] @ direction(1)) * (x[:, 0] @ direction(2))


def cubic(x):
    return quadratic(x) + (x[:, 0] @ direction(3)) ** 3 / 10


def expectation(problem, options, copies=1):
    """Over all responses, and `copies` draws of the noise given each."""
    return enumerated(at_every_response(problem, options, copies), problem.probability(), problem.exact_gradient())


def bias(problem, estimator, tau=1.0, **options):
    return expectation(problem, settings(estimator, tau, **options)).bias


def rows_that_draw(problem, tokens, tries):
    """[N, S] noise rows whose free draw, after the tokens before it, is tokens[s]; none is used twice."""
    with torch.no_grad():
        logits = problem.logits(tokens[None])[0]  # [S, V]
    rows = torch.arange(len(tokens) * tries).view(-1, tries)
    ids = torch.arange(logits.shape[1]).expand(*rows.shape, -1)
    drawn = (logits[:, None] + gumbel(0, 0, rows, ids, torch.float64)).argmax(-1)  # [S, tries]
    found = [r[d == token] for r, d, token in zip(rows, drawn, tokens, strict=True)]
    return torch.stack([f[: min(map(len, found))] for f in found], dim=1)


def given(problem, tokens, options, rows):
    """[N, P] gradients of the response `tokens` [S] under the noise of `rows` [N, S]."""
    return problem.replayed(problem.rollout(tokens.expand(len(rows), -1), rows), options)


# -- one gradient per response -------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_shares_of_responses_are_those_of_replay(estimator):
    """They add up to what replay accumulates, and each is that of its response alone."""
    problem, options = problem_of(), settings(estimator)
    rollout = problem.drawn(7, seed=1)
    shares = problem.replayed(rollout, options)

    def accumulated(part):
        ones = torch.ones(part.tokens.shape, dtype=torch.float64)
        replay(problem.policy, problem.reward, part, options, reward_weight=ones[:, 0], kl_weight=0.2 * ones)
        return gradients(problem.policy)

    assert relative_error(shares.sum(0), accumulated(rollout)) < 1e-12
    assert relative_error(shares[3], accumulated(rollout.cut(3, 4))) < 1e-12


# -- gumbel and rao ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens, tau", [([1, 3, 0], 0.5), ([2, 2, 1], 1.5)])
def test_gumbel_given_the_response_is_rao(tokens, tau):
    """Means agree within 4 standard errors in every direction looked at, and 16 draws leave less than an eighth."""
    problem, tokens = problem_of(), torch.tensor(tokens)
    one = given(problem, tokens, settings("gumbel", tau), rows_that_draw(problem, tokens, 20_000))
    fresh = torch.arange(1000 * len(tokens)).view(1000, -1)
    many = given(problem, tokens, settings("rao", tau), fresh)
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(one.shape[1], 8, generator=generator, dtype=torch.float64)
    directions[:, 0] = many.mean(0)

    def z(first, second):
        a, b = first @ directions, second @ directions
        return (a.mean(0) - b.mean(0)) / (a.var(0) / len(a) + b.var(0) / len(b)).sqrt()

    assert len(one) > 1000
    assert z(one, many).abs().max() < 4
    free = given(problem, tokens, settings("gumbel", tau), fresh)  # noise that did not draw these tokens
    assert z(free, many).abs().max() > 10
    assert sampled(many)[0] < sampled(one)[0] / 8


def test_rao_averages_independent_draws():
    """Of one token's gradient, linear in its draw, 16 draws leave a sixteenth of the variance."""
    problem, token = problem_of(1), torch.tensor([2])
    one = given(problem, token, settings("gumbel", 0.5), rows_that_draw(problem, token, 40_000))
    many = given(problem, token, settings("rao", 0.5), torch.arange(4000)[:, None])
    assert len(one) > 4000
    assert sampled(one)[0] / sampled(many)[0] == pytest.approx(16, rel=0.15)


def test_rao_has_less_variance_over_responses():
    """Of one response's gradient, noise and tokens together: `gumbel` from the sampler, `rao` by enumeration."""
    problem = problem_of()
    rao = expectation(problem, settings("rao", 0.5), copies=8)
    trace, error = sampled(problem.replayed(problem.drawn(2000, seed=3), settings("gumbel", 0.5)))
    assert trace - rao.trace > 4 * (error**2 + rao.trace_error**2) ** 0.5
    assert trace > 1.2 * rao.trace


def test_gumbel_is_the_gradient_of_the_relaxed_weights():
    """Two symbols, a linear reward: the exact gradient times E[w (1 - w)] / (tau pi_0 pi_1), w = sigmoid((l + L) / tau)
    with logistic L. Tokens are drawn at temperature 1, so tau enters nowhere else."""
    problem = problem_of(1, symbols=2, kl_coef=0.0, function=linear(0))
    with torch.no_grad():
        odds = problem.logits(torch.tensor([[0]]))[0, 0].diff()
    uniform = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    both = problem.probability().prod()
    for tau in (0.5, 1.0, 2.0):
        w = ((odds + uniform.logit()) / tau).sigmoid()
        factor = ((w * (1 - w)).mean() / (tau * both)).item()
        mean = expectation(problem, settings("rao", tau, samples=64), copies=300)
        assert abs(mean.bias - abs(factor - 1)) < 4 * mean.bias_error + 1e-6
        assert mean.bias_error < 0.01 and mean.cosine == pytest.approx(1, abs=1e-3)


# -- against the exact gradient ------------------------------------------------------------------------------------


def test_score_function_is_unbiased():
    problem = problem_of()
    probability, exact = problem.probability(), problem.exact_gradient()
    plain, score = problem.score_function()
    assert probability.sum().item() == pytest.approx(1, abs=1e-12)
    assert relative_error(probability @ plain, exact) < 1e-9
    best = enumerated(reinforce(problem, probability), probability, exact)
    assert best.bias < 1e-9
    for baseline in (-0.3, 0.0, 0.3):
        assert enumerated((plain - baseline * score)[None], probability, exact).trace > best.trace


@pytest.mark.parametrize("length, kl_coef", [(1, 0.2), (3, 0.0)])
def test_straight_through_is_exact_for_a_linear_reward(length, kl_coef):
    """Of the first token, and with KL that no later token adds to; not once a token moves a later one's logits."""
    problem = problem_of(length, kl_coef=kl_coef, function=linear(0))
    assert bias(problem, "straight_through") < 1e-9
    assert bias(problem, "straight_through", hops=0) < 1e-9
    assert bias(problem, "reinmax") < 1e-9
    if length > 1:
        assert bias(problem_of(length, kl_coef=0.0, function=linear(1)), "straight_through") > 1e-3
        assert bias(problem_of(length, kl_coef=kl_coef + 0.2, function=linear(0)), "straight_through") > 1e-3


def test_reinmax_is_exact_for_a_quadratic_reward_at_temperature_one():
    problem = problem_of(1, function=quadratic)
    assert bias(problem, "reinmax") < 1e-9
    assert bias(problem_of(3, kl_coef=0.0, function=quadratic), "reinmax") < 1e-9
    for tau in (0.5, 2.0):
        assert bias(problem, "reinmax", tau) > 1e-2
    assert bias(problem, "straight_through") > 1e-2
    assert bias(problem_of(1, function=cubic), "reinmax") > 1e-3


def test_gumbel_of_a_linear_reward_is_exact_as_tau_vanishes():
    """The relaxed weights become the one-hot, whose mean is pi."""
    problem = problem_of(1, function=linear(0))
    found = [expectation(problem, settings("rao", tau, samples=64), copies=50) for tau in (2.0, 1.0, 0.5, 0.1)]
    biases = [f.bias for f in found]
    assert all(b < 0.8 * a for a, b in zip(biases, biases[1:], strict=False))
    assert biases[-1] < 0.1 and max(f.bias_error for f in found) < 0.03


def test_close_embeddings_leave_only_the_bias_of_the_relaxation():
    """As embeddings close up, models are linear in the choice of tokens: what is left is `gumbel`'s own. Without KL,
    whose gradient at a step's own logits does not shrink with the embeddings."""

    def biases(spread):
        problem = problem_of(spread=spread, kl_coef=0.0)
        rao = expectation(problem, settings("rao", 2.0), copies=4)
        return bias(problem, "straight_through"), bias(problem, "reinmax"), rao.bias

    straight, second_order, relaxed = biases(0.02)
    wide_straight, wide_second_order, _ = biases(0.08)
    assert 3 < wide_straight / straight < 5  # of first order
    assert 12 < wide_second_order / second_order < 20  # of second
    assert straight < 0.05 < relaxed


# -- steps at the logits -------------------------------------------------------------------------------------------


def test_the_exact_gradient_at_the_logits_is_that_of_the_parameters():
    """Pulled back through the policy, weighted by how likely each prefix is; and the score function's mean at every
    prefix, with KL's own gradient, is the same."""
    problem = problem_of()
    exact = problem.exact_at_logits()
    logits = problem.logits(problem.responses)
    weighted = (exact.probability[:, None, None] * -exact.gradient * logits).sum()
    pulled = torch.cat([g.flatten() for g in torch.autograd.grad(weighted, problem.policy.parameters())])
    assert relative_error(pulled, problem.exact_gradient()) < 1e-9
    mean = problem.prefix_mean(score_at_logits(problem, exact)[0], exact.probability)
    assert relative_error(mean + exact.kl_gradient, exact.gradient) < 1e-9


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("hops", [0, 1, 8])
def test_the_gradient_at_the_logits_is_that_of_replay(estimator, hops):
    """With KL's own, pulled back through the policy, it is what replay gives the parameters: for responses from the
    sampler, whose candidates are sorted, and under a cap on the hops too."""
    problem, options = problem_of(), settings(estimator, hops=hops)
    rollout = problem.drawn(5, seed=1)
    kl = problem.exact_at_logits().kl_gradient[(rollout.tokens * torch.tensor([16, 4, 1])).sum(1)]
    whole = -(problem.at_logits(rollout, options) + kl)
    (whole * problem.logits(rollout.tokens)).sum().backward()
    assert relative_error(gradients(problem.policy), problem.replayed(rollout, options).sum(0)) < 1e-9


def steps_of(problem, options, copies=1):
    exact = problem.exact_at_logits()
    return step_products(problem, exact, logits_of_every_response(problem, options, copies))


def test_straight_through_of_a_linear_reward_is_the_best_natural_step():
    """It is the exact gradient without noise, of length 1."""
    found = steps_of(problem_of(1, function=linear(0)), settings("straight_through"))
    assert shares(found)["natural_step"] == pytest.approx(1, abs=1e-9)
    assert (found.length_gain / found.length_size).item() == pytest.approx(1, abs=1e-9)
    assert (found.fisher_gain / found.fisher_size).item() == pytest.approx(1, abs=1e-9)
    assert shares(found)["plain_step"] < 0.99


def test_gumbel_of_a_linear_reward_is_the_best_plain_step_as_tau_grows():
    """The relaxed weights become even, and the logits move along the rewards themselves; the factor of length grows
    with tau."""
    problem = problem_of(1, kl_coef=0.0, function=linear(0))
    found = [steps_of(problem, settings("rao", tau), copies=4) for tau in (1.0, 4.0, 1000.0)]
    plain = [shares(f)["plain_step"] for f in found]
    assert plain[0] < plain[1] < plain[2] == pytest.approx(1, abs=1e-4)
    lengths = [(f.length_gain / f.length_size).item() for f in found]
    assert lengths[0] < lengths[1] < lengths[2]


def test_noise_costs_steps_and_bias_costs_the_rest():
    problem = problem_of()
    exact = problem.exact_at_logits()
    score = shares(step_products(problem, exact, score_at_logits(problem, exact)))
    assert score["natural_ceiling"] == pytest.approx(1, abs=1e-9)
    rao = steps_of(problem, settings("rao", 0.5), copies=8)
    rollout = problem.drawn(2000, seed=3)
    gumbel = drawn_products(rao, problem, exact, rollout, problem.at_logits(rollout, settings("gumbel", 0.5)))
    for kind in ("plain", "natural"):
        assert shares(gumbel)[f"{kind}_step"] < shares(rao)[f"{kind}_step"] < shares(rao)[f"{kind}_ceiling"] < 1
        assert score[f"{kind}_step"] < score[f"{kind}_ceiling"]
    assert score["natural_step"] < shares(rao)["natural_step"]

"""What a step gains at the logits: closed forms in float64, and sampled products against their expectations."""

from __future__ import annotations

import itertools

import pytest
import torch

from grade.studies.variance.steps import Branches, Products, euclidean, natural, plain, products, scores, shares, steps


def table(count=5, seed=0):
    """(p, A) of a token, A of mean 0 under p."""
    generator = torch.Generator().manual_seed(seed)
    p = torch.randn(count, generator=generator, dtype=torch.float64).softmax(0)
    advantage = torch.randn(count, generator=generator, dtype=torch.float64)
    return p, advantage - p @ advantage


def exactly(p, target, outcomes, weights):
    """Products of a token whose estimator is outcomes [n, k] with probabilities weights [n]."""
    mean, at = weights @ outcomes, p.expand_as(outcomes)

    def cost(metric):
        return weights @ metric(outcomes, outcomes, at)

    return Products(
        natural(mean, target, p),
        cost(natural),
        natural(mean, mean, p),
        euclidean(mean, target, p),
        cost(plain),
        plain(mean, mean, p),
        natural(target, target, p),
        euclidean(mean, target, p),
        euclidean(mean, mean, p),
        natural(mean, target, p),
        natural(mean, mean, p),
    )


def constant(p, target, g):
    return shares(exactly(p, target, g[None], torch.ones(1, dtype=torch.float64)))


def test_metrics_are_those_of_the_fisher_information():
    p, advantage = table()
    fisher = p.diag() - torch.outer(p, p)
    u, v = fisher @ advantage, fisher @ torch.arange(5.0, dtype=torch.float64)
    assert torch.allclose(u, p * advantage)
    assert natural(u, v, p).item() == pytest.approx((u @ torch.linalg.pinv(fisher) @ v).item(), rel=1e-10)
    assert plain(u, v, p).item() == pytest.approx((u @ fisher @ v).item(), rel=1e-10)


def test_a_candidate_that_cannot_be_drawn_adds_nothing():
    p, advantage = table()
    longer = torch.cat([p, torch.zeros(1, dtype=torch.float64)])
    g = torch.cat([p * advantage, torch.zeros(1, dtype=torch.float64)])
    assert natural(g, g, longer).item() == pytest.approx((p @ advantage**2).item())


def test_the_exact_gradient_is_the_best_natural_step():
    p, advantage = table()
    found = constant(p, p * advantage, 7 * p * advantage)
    assert found["natural_step"] == pytest.approx(1, abs=1e-12) == found["natural_ceiling"]
    # Its plain step is its correlation with the advantages.
    g, mean = p * advantage, p @ (p * advantage)
    correlation = (p @ (g * advantage)) / ((p @ (g - mean) ** 2) * (p @ advantage**2)).sqrt()
    assert found["plain_step"] == pytest.approx(correlation.item(), rel=1e-12)
    assert found["plain_step"] < 0.99


def test_even_weights_are_the_best_plain_step():
    """What a rule gives whose weights forget p, as Gumbel-Softmax's at a high temperature: A - mean(A)."""
    p, advantage = table()
    found = constant(p, p * advantage, (advantage - advantage.mean()) / 5)
    assert found["plain_step"] == pytest.approx(1, abs=1e-12)
    u = advantage - advantage.mean()
    natural_step = (u @ advantage) / ((u**2 / p).sum() * (p @ advantage**2)).sqrt()
    assert found["natural_step"] == pytest.approx(natural_step.item(), rel=1e-12)
    assert found["natural_step"] < 0.99
    assert constant(p, p * advantage, -u)["plain_step"] == pytest.approx(-1, abs=1e-12)


def test_the_score_function_pays_for_every_candidate():
    p, advantage = table()
    outcomes = advantage[:, None] * (torch.eye(5, dtype=torch.float64) - p)
    found = shares(exactly(p, p * advantage, outcomes, p))
    best = p @ advantage**2
    assert found["natural_ceiling"] == pytest.approx(1, abs=1e-12)
    assert found["natural_step"] == pytest.approx((best / (advantage**2 @ (1 - p))).sqrt().item(), rel=1e-12)
    # (onehot_a - p)^T F (onehot_a - p) = p_a - p_a^2 - 2 (p_a^2 - p_a s) + c, with s = sum p^2, c = sum p^3 - s^2.
    s = p @ p
    quadratic = p - p**2 - 2 * (p**2 - p * s) + (p**3).sum() - s**2
    gain = (p * advantage) @ (p * advantage)
    assert found["plain_step"] == pytest.approx(
        (gain / ((p * advantage**2) @ quadratic * best).sqrt()).item(), rel=1e-12
    )


def test_no_step_exceeds_the_best():
    for seed in range(20):
        p, advantage = table(seed=seed)
        generator = torch.Generator().manual_seed(100 + seed)
        g = torch.randn(7, 5, generator=generator, dtype=torch.float64)
        g = g - g.mean(1, keepdim=True)
        found = shares(exactly(p, p * advantage, g, torch.full((7,), 1 / 7, dtype=torch.float64)))
        assert all(abs(value) <= 1 + 1e-12 for value in found.values())
        for kind in ("plain", "natural"):
            assert abs(found[f"{kind}_step"]) <= abs(found[f"{kind}_ceiling"])


@pytest.mark.parametrize("with_kl, differentiated", [(False, 3), (True, 3), (True, 2)])
def test_sampled_products_are_unbiased(with_kl, differentiated):
    """Over all ways in which three responses to a prefix can be drawn, tokens of three candidates and one of two
    returns after each: the mean of the products is the exact one, whatever the gradient does with token and return."""
    p, _ = table(3)
    values = torch.tensor([[1.0, 3.0], [-2.0, 0.5], [4.0, 4.5]], dtype=torch.float64)  # [token, what follows]
    advantage = values.mean(1)
    generator = torch.Generator().manual_seed(1)
    gradients = torch.randn(3, 2, 3, generator=generator, dtype=torch.float64)  # [token, what follows, k]
    gradients = gradients - gradients.mean(-1, keepdim=True)
    kl = (p * advantage.flip(0) - p * (p @ advantage.flip(0))) * with_kl
    single = [(token, after) for token in range(3) for after in range(2)]
    draws = torch.tensor(list(itertools.product(single, repeat=3)))  # [216, 3, 2]
    token, after = draws[..., 0], draws[..., 1]
    weight = (p[token] / 2).prod(1)
    assert weight.sum().item() == pytest.approx(1)
    drawn = torch.nn.functional.one_hot(token, 3).double()
    at = p.expand(len(draws), -1)
    score = scores(values[token, after], drawn, at)
    target, chances = p * (advantage - p @ advantage), (p[:, None] / 2).expand(3, 2).flatten()

    def mean(found):
        return [(weight @ values).item() for values in found]

    flat = gradients.flatten(0, 1)
    exact = exactly(p, target + kl, flat + kl, chances)
    bare = exactly(p, target, flat, chances)
    wanted = [*exact[:7], *bare[7:]]
    path = gradients[token, after][:, :differentiated]
    found = mean(products(path, score, kl.expand_as(at), at))
    assert found == pytest.approx([value.item() for value in wanted], rel=1e-9, abs=1e-12)

    # The score function's own, whose baselines hold each other's returns.
    found = Products(*mean(products(None, score, kl.expand_as(at), at)))
    exact = exactly(p, target + kl, (target + kl)[None], torch.ones(1, dtype=torch.float64))
    for name in ("natural_gain", "natural_size", "plain_gain", "plain_size", "best"):
        assert getattr(found, name) == pytest.approx(getattr(exact, name).item(), rel=1e-9)
    assert found.length_gain == pytest.approx((target @ target).item(), rel=1e-9) == found.length_size
    assert found.fisher_gain == pytest.approx(natural(target, target, p).item(), rel=1e-9)


def simulated(prefixes, *, factor=0.5, noise=1.0, signal=1.0, copies=8, seed=0):
    """Branches of an estimator that is `factor` times the exact gradient, plus noise, at one distribution of tokens."""
    p, advantage = table(4, seed=3)
    generator = torch.Generator().manual_seed(seed)
    at = p.expand(prefixes, -1)
    token = torch.multinomial(at, copies, replacement=True, generator=generator)
    returns = signal * advantage[token] + torch.randn(token.shape, generator=generator, dtype=torch.float64)
    path = torch.randn(*token.shape, 4, generator=generator, dtype=torch.float64) * noise
    path = factor * signal * p * advantage + at[:, None] * (path - (at[:, None] * path).sum(-1, keepdim=True))
    score = scores(returns, torch.nn.functional.one_hot(token, 4).double(), at)
    branches = Branches(prefixes)
    branches.add(products(path, score, torch.zeros_like(at), at))
    return branches


def test_lengths_and_their_intervals():
    inside = 0
    for seed in range(20):
        found = steps(simulated(200, seed=seed).means(), 0.5)
        inside += all(low <= 2.0 <= high for low, high in (found["factor_interval"], found["fisher_factor_interval"]))
    assert inside >= 16  # two intervals of 95 % each
    p, advantage = table(4, seed=3)
    found = steps(simulated(4000, seed=99).means(), 0.5)
    assert found["factor"] == pytest.approx(2.0, rel=0.1)
    best = (p @ advantage**2).sqrt().item()
    assert found["best"] == pytest.approx(best, rel=0.1)
    assert found["natural_ceiling"] == pytest.approx(best, rel=0.1)
    assert found["natural_share"] == pytest.approx(found["natural_step"] / found["best"], rel=1e-9)
    assert found["plain_step_per_second"] == pytest.approx(found["plain_step"] ** 2 / 0.5)


def test_without_signal_there_are_bounds():
    """Of a reward that the token does not change: no best step, no share, no length."""
    found = [steps(simulated(60, signal=0.0, seed=seed).means(), 0.5) for seed in range(20)]
    assert sum(f["best"] is None for f in found) >= 18
    assert sum(f["factor"] is None and f["plain_ceiling"] is None for f in found) >= 18
    assert sum(f["plain_step_per_second"] is None for f in found) >= 18
    assert all(f["best_interval"][1] < 1 for f in found)


def test_a_share_is_bounded_where_the_best_is_unknown():
    """A weak effect that a precise estimator finds: its step stands out before the best does."""
    found = steps(simulated(60, signal=0.3, noise=0.01, copies=4, seed=5).means(), 0.5)
    assert found["best"] is None and found["natural_step_interval"][0] > 0
    low, high = found["natural_share_interval"]
    assert found["natural_share"] is None and high is None
    assert low == pytest.approx(found["natural_step_interval"][0] / found["best_interval"][1])


def test_too_few_prefixes_say_nothing():
    branches = simulated(2)
    assert branches.taken == 2 and steps(branches.means(), 1.0) == {}

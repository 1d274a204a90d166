r"""What a step along a gradient estimator gains under a bound on KL, token by token at the logits.

The Euclidean distance of two gradients of parameters is not what an optimizer feels. Take one token, its candidates'
logits l, the distribution p = softmax(l) it is drawn from, and A_j, the expected return with candidate j. Then

    grad J = p * (A - <p, A>) = F A,        F = diag(p) - p p^T

and a step d of the logits raises J by <grad J, d> = Cov_p(A, d) while the policy moves by d^T F d / 2 = Var_p(d) / 2
nats, both to leading order (F is the Fisher information of l, p A -> A the natural gradient; Amari 1998). So no step
of KL e raises J by more than sqrt(2 e) sqrt(Var_p(A)): the best one moves the logits along A. Of an estimator g of
grad J, a random vector that sums to 0 over the candidates, there are two steps:

    plain      d = g        gains  E[g]^T grad J      / sqrt(E[g^T F g])
    natural    d = F^+ g    gains  E[g]^T F^+ grad J  / sqrt(E[g^T F^+ g])

times sqrt(2 e) if it is as long as a KL of e nats allows, where F^+ g = g / p up to a constant. Both are correlations
under the policy with A, times sqrt(Var_p(A)): of g itself, and of g / p. The plain step is what gradient descent does
to a table of logits, and SGD or Adam through a network as far as its logits are moved independently of each other:
nothing divides by p. The natural step is that of an optimizer which preconditions by F (natural gradient, TRPO). Its
length is a sum of g_j^2 / p_j, in which candidates count the more the rarer they are: the score function's,
A (onehot - p), is sum_a A_a^2 (1 - p_a), not weighted by p, and grows with the number of candidates; a rule whose
weights are flatter than sqrt(p), as Gumbel-Softmax's are above tau = 2, has one that rare candidates dominate. As a
share of the best step, sqrt(Var_p(A)), the exact natural gradient has 1 in the natural step and less in the plain one,
and g proportional to A - mean(A) has 1 in the plain one.

`step` is of one response's g, noise included, and `ceiling` of infinitely many, with E[g] E[g]^T in place of E[g g^T]:
what the bias leaves. Over many tokens numerators, denominators and the bound are averaged over prefixes as the policy
meets them: one bound on the mean KL of a table with a row per prefix. Steps of a network also move what is alike; that
is not in here.

**Length.** The factor c by which g, KL's own gradient at the step's logits left out, is to be multiplied to have the
exact one's length along itself: c = <E g, grad J> / <E g, E g>, in the Euclidean metric or with F^+ between. g is what
method.path_scale multiplies, without it: c is what that should be.

By sampling, nothing of this is biased: all products are of different responses of the same prefix. With a leave-one-out
baseline among m responses the score function s_j = (R_j - mean of the others' R) (onehot_j - p) has E[s_j] = grad J
given all other responses, so E <g_i, s_j> = <E g, grad J>; and since each baseline holds the other's return,
E <s_i, s_j> = |grad J|^2 (1 + 1 / (m - 1)^2), which is divided out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from grade.config.studies import BLOCKS
from grade.jackknife import critical
from grade.studies.variance.statistics import Interval, jackknife


def natural(u: Tensor, v: Tensor, p: Tensor) -> Tensor:
    """[...], u^T F^+ v of vectors [..., k] that sum to 0; where p is 0 they are, and nothing is added."""
    return (torch.where(p > 0, u / p, 0.0) * v).sum(-1)


def plain(u: Tensor, v: Tensor, p: Tensor) -> Tensor:
    """[...], u^T F v."""
    return (p * u * v).sum(-1) - (p * u).sum(-1) * (p * v).sum(-1)


def euclidean(u: Tensor, v: Tensor, p: Tensor) -> Tensor:
    """[...], u^T v."""
    return (u * v).sum(-1)


Metric = Callable[[Tensor, Tensor, Tensor], Tensor]


class Products(NamedTuple):
    """Of an estimator with the exact gradient, each averaged over prefixes; tensors of one shape.

    Args:
        natural_gain, plain_gain: E[g]^T F^+ grad J and E[g]^T grad J.
        natural_cost, plain_cost: E[g^T F^+ g] and E[g^T F g].
        natural_size, plain_size: the same of E[g].
        best: grad J^T F^+ grad J, the variance of A.
        length_gain, length_size: <E g, grad J> and <E g, E g> without KL's own gradient.
        fisher_gain, fisher_size: the same with F^+ between.
    """

    natural_gain: Tensor
    natural_cost: Tensor
    natural_size: Tensor
    plain_gain: Tensor
    plain_cost: Tensor
    plain_size: Tensor
    best: Tensor
    length_gain: Tensor
    length_size: Tensor
    fisher_gain: Tensor
    fisher_size: Tensor


def scores(returns: Tensor, drawn: Tensor, p: Tensor) -> Tensor:
    """[G, m, k], the score-function gradients at the logits of m responses to each of G prefixes.

    Args:
        returns: [G, m], what followed the token, larger is better.
        drawn: [G, m, k], the token's one-hot.
        p: [G, k], what it was drawn from.
    """
    m = returns.shape[1]
    advantage = (returns - returns.mean(1, keepdim=True)) * (m / (m - 1))  # the mean of the others as baseline
    return advantage[..., None] * (drawn - p[:, None])


def products(path: Tensor | None, score: Tensor, kl: Tensor, p: Tensor) -> Products:
    """Unbiased, of every prefix, [G] each.

    Args:
        path: [G, n, k], an estimator's gradients of the objective at the logits, without KL's at its own step; None:
            the estimator is the score function.
        score: [G, m, k], `scores` of the same responses and, where m > n, of others after them.
        kl: [G, k], the objective's gradient by KL at its own step, which everyone knows.
        p: [G, k].
    """
    m = score.shape[1]
    shrink = 1 + 1 / (m - 1) ** 2  # of products of two scores: each baseline holds the other's return
    own = shrink if path is None else 1.0
    g = score if path is None else path
    at = p[:, None]

    def pairs(u: Tensor, v: Tensor, metric: Metric) -> Tensor:
        """Mean over pairs of different responses, u having the first of those that v has."""
        n, m = u.shape[1], v.shape[1]
        every = metric(u.sum(1), v.sum(1), p)
        return (every - metric(u, v[:, :n], at).sum(1)) / (n * (m - 1))

    def whole(u: Tensor, v: Tensor, metric: Metric, factor: float) -> Tensor:
        """With KL's own gradient added to both; `factor` is that of products of u and v alone."""
        with_kl = metric(u.mean(1) + v.mean(1), kl, p) + metric(kl, kl, p)
        return pairs(u, v, metric) / factor + with_kl

    def cost(metric: Metric) -> Tensor:
        total = g + kl[:, None]
        return metric(total, total, at).mean(1)

    return Products(
        natural_gain=whole(g, score, natural, own),
        natural_cost=cost(natural),
        natural_size=whole(g, g, natural, own),
        plain_gain=whole(g, score, euclidean, own),
        plain_cost=cost(plain),
        plain_size=whole(g, g, plain, own),
        best=whole(score, score, natural, shrink),
        length_gain=pairs(g, score, euclidean) / own,
        length_size=pairs(g, g, euclidean) / own,
        fisher_gain=pairs(g, score, natural) / own,
        fisher_size=pairs(g, g, natural) / own,
    )


def shares(of: Products) -> dict[str, float]:
    """Steps and ceilings as shares of the best step, from exact products; 0 of an estimator that does not move."""

    def share(gain: Tensor, cost: Tensor) -> float:
        scale = float(cost * of.best) ** 0.5
        return float(gain) / scale if scale > 0 else 0.0

    return {
        "plain_step": share(of.plain_gain, of.plain_cost),
        "plain_ceiling": share(of.plain_gain, of.plain_size),
        "natural_step": share(of.natural_gain, of.natural_cost),
        "natural_ceiling": share(of.natural_gain, of.natural_size),
    }


class Branches:
    """Accumulates the products of one estimator over prefixes.

    Args:
        count: prefixes that will come; they fall into BLOCKS blocks of adjacent ones.
    """

    def __init__(self, count: int):
        self.count, self.taken = count, 0
        self._sums = torch.zeros(BLOCKS, len(Products._fields), dtype=torch.float64)
        self._sizes = torch.zeros(BLOCKS, dtype=torch.float64)

    def add(self, found: Products) -> None:
        for values in torch.stack(found, dim=1).double().cpu():
            block = min(self.taken * BLOCKS // self.count, BLOCKS - 1)
            self._sums[block] += values
            self._sizes[block] += 1
            self.taken += 1

    def means(self) -> Tensor:
        """[blocks with a prefix, products] float64."""
        filled = self._sizes > 0
        return self._sums[filled] / self._sizes[filled, None]


Figure = tuple[float | None, tuple[float, float | None] | None]
"""A value and its 95 % interval."""


def steps(means: Tensor, seconds_per_sample: float) -> dict[str, float | tuple | None]:
    """From block means [blocks, products] of independent prefixes; empty of fewer than three blocks.

    Returns:
        As a row of variance.json has it, each with NAME_interval:

        plain_step, natural_step: what one response's step gains, in units of the reward; times sqrt(2 e) for a KL of e
            nats.
        plain_ceiling, natural_ceiling: what infinitely many responses' gains; None where E g does not stand out of the
            noise.
        plain_share, natural_share: the steps over the best one; None where that does not stand out, and the interval
            is the lower bound alone.
        best: what the best step gains; None likewise.
        factor, fisher_factor: c, the factor of length, in both metrics; None where E g does not stand out.

        And plain_step_per_second: the square of plain_step, which grows with the responses as long as noise rules it,
        of as many as a second gives; None where the step may not gain.
    """
    blocks = len(means)
    if blocks < 3:
        return {}

    def interval(statistic: Callable[[Products], Tensor]) -> tuple[float, Interval]:
        value, error = jackknife(lambda keep: float(statistic(Products(*means[keep].mean(0)))), blocks)
        reach = critical(blocks) * error
        return value, (value - reach, value + reach)

    def ratio(gain: str, over: str, power: float) -> Figure:
        """A gain over a power of what must stand out of the noise, or of a cost, which is a mean of squares."""
        value, (low, _) = interval(lambda of: getattr(of, over))
        if (value if over.endswith("_cost") else low) <= 0:
            return None, None
        return interval(lambda of: getattr(of, gain) / getattr(of, over).clamp_min(1e-300) ** power)

    square, (low, high) = interval(lambda of: of.best)

    def share(kind: str) -> Figure:
        if low > 0:
            return interval(
                lambda of: (
                    getattr(of, f"{kind}_gain") / (getattr(of, f"{kind}_cost") * of.best).clamp_min(1e-300).sqrt()
                )
            )
        _, ends = found[f"{kind}_step"]
        return None, None if ends is None or ends[0] <= 0 or high <= 0 else (ends[0] / high**0.5, None)

    ends = (max(low, 0.0) ** 0.5, max(high, 0.0) ** 0.5)
    found: dict[str, Figure] = {"best": (square**0.5 if low > 0 else None, ends)}
    for kind in ("plain", "natural"):
        found[f"{kind}_step"] = ratio(f"{kind}_gain", f"{kind}_cost", 0.5)
        found[f"{kind}_ceiling"] = ratio(f"{kind}_gain", f"{kind}_size", 0.5)
        found[f"{kind}_share"] = share(kind)
    found["factor"] = ratio("length_gain", "length_size", 1.0)
    found["fisher_factor"] = ratio("fisher_gain", "fisher_size", 1.0)
    row: dict[str, float | tuple | None] = {}
    for name, (value, spread) in found.items():
        row |= {name: value, f"{name}_interval": spread}
    step, spread = found["plain_step"]
    gains = step is not None and spread is not None and spread[0] > 0
    return row | {"plain_step_per_second": step**2 / seconds_per_sample if gains and step is not None else None}

"""The local rules: from the effect of each candidate to the gradient at the logits of the support."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from grade_kernels.torch_ops import embedding
from grade_kernels.torch_ops.support import noisy_logits, softmax_vjp, tempered_softmax


def candidate_grad(grads: list[Tensor], tables: list[Tensor], ids: Tensor) -> Tensor:
    """v [N, k] = sum over models of <grad [N, d_e], table[ids] [N, k, d_e]>."""
    parts = [embedding.candidate_dots(grad, ids, table) for grad, table in zip(grads, tables, strict=True)]
    return sum(parts[1:], start=parts[0])


def token_vjp(
    grads: list[Tensor],
    tables: list[Tensor],
    logits: Tensor,
    ids: Tensor,
    tokens: Tensor | None,
    keys: Tensor,
    estimator: str,
    tau: float,
    seed: int,
    draws: range,
    dtype: torch.dtype,
) -> Tensor:
    """dlogits [N, k] by the rules that `grade_kernels.vjp.SoftTokenRule` writes down.

    `draws` are those of the noise, for gumbel and rao: the free draw is 0, the others are conditional on
    `tokens` [N].
    """
    terms = rule_terms(logits.to(dtype), ids, tokens, keys, estimator, tau, seed, draws)
    return apply_terms(terms, candidate_grad(grads, tables, ids).to(dtype))


def rule_terms(
    logits: Tensor,
    ids: Tensor,
    tokens: Tensor | None,
    keys: Tensor,
    estimator: str,
    tau: float,
    seed: int,
    draws: range,
) -> Iterator[tuple[float, Tensor]]:
    """Pairs (c, w [N, k]), made one at a time, such that the rule is v -> sum of c J(w) v; `draws` as above."""
    if estimator == "straight_through":
        yield 1.0, logits.softmax(-1)
    elif estimator == "reinmax":
        assert tokens is not None
        one_hot = (ids == tokens[:, None]).to(logits.dtype)
        yield 2.0, (one_hot + tempered_softmax(logits, tau)) / 2
        yield -0.5, logits.softmax(-1)
    else:
        for draw in draws:
            z = noisy_logits(logits, ids, keys, seed, draw, tokens if draw else None)
            yield 1 / (tau * len(draws)), tempered_softmax(z, tau)


def apply_terms(terms: Iterable[tuple[float, Tensor]], v: Tensor) -> Tensor:
    """sum of c J(w) v over the terms (c, w): [N, k]."""
    total = torch.zeros_like(v)
    for factor, weights in terms:
        total.add_(softmax_vjp(weights, v), alpha=factor)
    return total

"""The local rules: from the effect of each candidate to the gradient at the logits of the support."""

from __future__ import annotations

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
    """dlogits [N, k] by the rules that `grade_kernels.vjp.soft_token_vjp` writes down.

    `draws` are those of the noise, for gumbel and rao: the free draw is 0, the others are conditional on
    `tokens` [N].
    """
    values, v = logits.to(dtype), candidate_grad(grads, tables, ids).to(dtype)
    if estimator == "straight_through":
        return softmax_vjp(values.softmax(-1), v)
    if estimator == "reinmax":
        one_hot = (ids == tokens[:, None]).to(dtype)
        midpoint = (one_hot + tempered_softmax(values, tau)) / 2
        return 2 * softmax_vjp(midpoint, v) - softmax_vjp(values.softmax(-1), v) / 2
    total = torch.zeros_like(values)
    for draw in draws:
        z = noisy_logits(values, ids, keys, seed, draw, tokens if draw else None)
        total += softmax_vjp(tempered_softmax(z, tau), v).div_(tau)
    return total.div_(len(draws))

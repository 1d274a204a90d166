"""The sampler: a support of k candidates for each row, noise over it, and a token."""

from __future__ import annotations

import torch
from torch import Tensor

from grade_kernels.common.chunks import Rows, gather
from grade_kernels.common.sample import Sample, Support, place
from grade_kernels.torch_ops import support as ops
from grade_kernels.torch_ops.logprob import log_sum_exp
from grade_kernels.torch_ops.topk import topk_ids


def select(
    logits: Rows, k: int, suppress: Tensor | None, indices: Tensor | None, tokens: Tensor | None, dtype: torch.dtype
) -> Support:
    """`candidates`, and the log-sum-exp of the rows."""
    ids, values = candidates(logits, k, suppress, indices, tokens, dtype)
    return Support(ids, values, log_sum_exp(logits, dtype))


def candidates(
    logits: Rows, k: int, suppress: Tensor | None, indices: Tensor | None, tokens: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(ids [N, k], their logits): the exact top-k of logits [N, V], or `indices` [N, k] where they are given.

    A token [N] that the support misses takes its last place.  `suppress` (int64 [m]) is left out, or at
    -inf where the support holds it anyway, unless it is the row's token.
    """
    ids = topk_ids(logits, k, suppress) if indices is None else indices
    if tokens is not None:
        ids = place(ids, tokens)[0]
    return ids, block(gather(logits, ids).to(dtype), ids, suppress, tokens)


def block(values: Tensor, ids: Tensor, suppress: Tensor | None, tokens: Tensor | None) -> Tensor:
    """Candidate logits with the suppressed ids at -inf, except where one is the given token."""
    if suppress is None:
        return values
    blocked = torch.isin(ids, suppress)
    if tokens is not None:
        blocked = blocked & (ids != tokens.unsqueeze(-1))
    return values.masked_fill(blocked, -torch.inf)


def sample(support: Support, keys: Tensor, seed: int, draw: int, tokens: Tensor | None, tau: float | Tensor) -> Sample:
    """One token per row from its support, or the weights given `tokens`; `keys` [N] are the rows' keys."""
    ids, values, lse = support
    z = ops.noisy_logits(values, ids, keys, seed, draw, tokens)
    chosen = ops.winner(z, ids) if tokens is None else tokens.clone()
    return Sample(ops.tempered_softmax(z, tau), chosen, (values - lse[:, None]).exp().sum(-1))


def select_and_sample(
    logits: Rows,
    k: int,
    tau: float | Tensor,
    keys: Tensor,
    seed: int,
    draw: int,
    suppress: Tensor | None,
    indices: Tensor | None,
    tokens: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Sample]:
    """(ids [N, k], the sample): `select`, then `sample`."""
    support = select(logits, k, suppress, indices, tokens, dtype)
    return support.ids, sample(support, keys, seed, draw, tokens, tau)

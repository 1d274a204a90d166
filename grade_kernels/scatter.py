"""scatter_tokens: the dense one-hot that the sparse form exists to avoid."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from grade_kernels.backend import backend_for, implementation
from grade_kernels.common import checks
from grade_kernels.sparse import SparseTokens, check_sparse


def scatter_tokens(tokens: SparseTokens, vocab_size: int) -> Tensor:
    """The dense distribution of (soft) tokens, the [..., V] tensor of the paper.

    Parameters
    ----------
    tokens : SparseTokens
        indices [..., k], distinct within a row and below `vocab_size`; weights [..., k]; tokens [...].
    vocab_size : int
        V, at least k.

    Returns
    -------
    Tensor [..., V]
        In the dtype of the weights.  Soft: the weights at their ids.  Hard: exactly the one-hot of the
        token.  Either way the gradient of the weights is the incoming gradient at their ids (straight-through
        where hard).

    Raises
    ------
    TypeError, ValueError
        On wrong dtypes, shapes or devices, or a vocabulary smaller than the support.
    """
    check_sparse(tokens)
    leading = tokens.tokens.shape
    n, k = math.prod(leading), tokens.indices.shape[-1]
    vocab_size = checks.check_int("vocab_size", vocab_size)
    if vocab_size < k:
        raise ValueError(f"vocab_size must be at least the {k} candidates of a row, got {vocab_size}")
    chosen = tokens.tokens.reshape(n) if tokens.hard else None
    backend = backend_for("scatter_tokens", tokens.weights)
    flat = _Scatter.apply(tokens.weights.reshape(n, k), tokens.indices.reshape(n, k), chosen, vocab_size, backend)
    return flat.view(*leading, vocab_size)


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights: Tensor, ids: Tensor, chosen: Tensor | None, vocab: int, backend: str) -> Tensor:
        ctx.save_for_backward(ids)
        if chosen is not None:
            ids, weights = chosen[:, None], weights.new_ones(chosen.shape[0], 1)
        return implementation(backend).scatter.scatter(ids, weights, vocab, weights.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (ids,) = ctx.saved_tensors
        return grad.gather(-1, ids), None, None, None, None

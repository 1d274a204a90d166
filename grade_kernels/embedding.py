"""soft_embedding: the embedding of a (soft) token."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from grade_kernels.backend import backend_for, implementation
from grade_kernels.common import checks
from grade_kernels.sparse import SparseTokens, check_sparse


def soft_embedding(tokens: SparseTokens, weight: Tensor) -> Tensor:
    """Embed soft tokens: sum_j w_j E[i_j], or exactly E[token] where they are hard.

    Parameters
    ----------
    tokens : SparseTokens
        indices [..., k], weights [..., k], tokens [...].
    weight : float [V, d]
        The embedding table E.

    Returns
    -------
    Tensor [..., d]
        In the dtype of `weight`, accumulated in float32 (float64 for float64).  Gradients:

        - to `tokens.weights`, hard or soft: <grad, E[i_j]> for each candidate;
        - to `weight`, only if it requires grad: what the dense product `scatter_tokens(tokens, V) @ E` gives, that
          is w_j grad to row i_j where soft, and grad to the row of the token where hard (the straight-through
          rule replaces the derivative of the token, not the table's).  Summed in float32 in a fixed order.

    Raises
    ------
    TypeError, ValueError
        On wrong dtypes, shapes or devices.
    """
    check_sparse(tokens)
    checks.check_table("weight", weight, None, tokens.weights.device)
    leading = tokens.tokens.shape
    backend = backend_for("soft_embedding", weight, tokens.weights)
    n, k = math.prod(leading), tokens.indices.shape[-1]
    flat = _SoftEmbedding.apply(
        tokens.weights.reshape(n, k),
        tokens.indices.reshape(n, k),
        tokens.tokens.reshape(n),
        weight,
        tokens.hard,
        backend,
    )
    return flat.view(*leading, weight.shape[1])


class _SoftEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weights: Tensor, indices: Tensor, chosen: Tensor, weight: Tensor, hard: bool, backend: str
    ) -> Tensor:
        ctx.save_for_backward(weights, indices, chosen, weight)
        ctx.hard, ctx.backend = hard, backend
        if hard:
            return F.embedding(chosen, weight)
        return implementation(backend).embedding.weighted_sum(weights, indices, weight).to(weight.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weights, indices, chosen, weight = ctx.saved_tensors
        ops = implementation(ctx.backend).embedding
        d_weights = d_weight = None
        if ctx.needs_input_grad[0]:
            d_weights = ops.candidate_dots(grad, indices, weight).to(weights.dtype)
        if ctx.needs_input_grad[3]:
            scale, ids = (None, chosen[:, None]) if ctx.hard else (weights, indices)
            d_weight = ops.scatter_sum(scale, ids, grad, weight.shape[0]).to(weight.dtype)
        return d_weights, None, None, d_weight, None, None

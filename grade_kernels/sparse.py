"""SparseTokens: one sampled (soft) token per position, over k candidates of the vocabulary."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from grade_kernels.common import checks


@dataclass(frozen=True)
class SparseTokens:
    """What `gumbel_topk` returns and `soft_embedding` takes.

    Attributes
    ----------
    indices : int64 [..., k]
        Candidate ids, the support.
    weights : float32 [..., k] (float64 for float64 logits)
        Gumbel-Softmax weights of the candidates, summing to 1; they carry the gradient.
    tokens : int64 [...]
        The sampled ids.
    mass : like weights, [...]
        Probability that the full distribution gives the support; no gradient.
    hard : bool
        True: the forward value is the token and the weights serve the backward pass only
        (straight-through).  False: the forward value is the mixture.
    """

    indices: Tensor
    weights: Tensor
    tokens: Tensor
    mass: Tensor
    hard: bool


def check_sparse(tokens: SparseTokens) -> None:
    """Refuse what is not a SparseTokens of matching shapes, dtypes and devices."""
    if not isinstance(tokens, SparseTokens):
        raise TypeError(f"tokens must be a SparseTokens (see gumbel_topk), got {type(tokens).__name__}")
    checks.check_float("tokens.weights", tokens.weights)
    leading, device = tokens.tokens.shape, tokens.weights.device
    checks.check_ids("tokens.tokens", tokens.tokens, leading, device)
    checks.check_support("tokens.indices", tokens.indices, leading, device)
    checks.check_shape("tokens.weights", tokens.weights, tokens.indices.shape)

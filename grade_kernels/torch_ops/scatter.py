"""The dense scatter of a row's candidates, and the backward pass of their weights."""

from __future__ import annotations

import torch
from torch import Tensor

from grade_kernels.torch_ops.support import softmax_vjp


def weights_vjp(weights: Tensor, grad: Tensor, tau: float | Tensor) -> Tensor:
    """J(w) v / tau [N, k], in the dtype of `weights`."""
    return softmax_vjp(weights, grad.to(weights.dtype)) / tau


def scatter(ids: Tensor, values: Tensor, vocab: int, dtype: torch.dtype) -> Tensor:
    """Dense [N, vocab] in `dtype`: the values [N, k] at their ids, which are distinct within a row, else 0."""
    dense = torch.zeros(ids.shape[0], vocab, dtype=dtype, device=ids.device)
    return dense.scatter_add_(-1, ids, values.to(dtype))

"""The head's product for the few rows of a token, on a CPU: the weight in oneDNN's own layout.

Such a product should take as long as reading the weight once. A plain matrix product takes that long for up to three
rows only, and several times as long for 4 to 32. Packing costs about as much as it saves in a few tokens, and a copy of
the weight while it is used.
"""

from __future__ import annotations

import torch
from torch import Tensor

# oneDNN's layout for 16 rows was as fast as that for the actual number, from 1 to 256.
_ROWS = 16
# Below, packing or calling oneDNN costs more than it saves.
_LEAST_NUMEL, _LEAST_ROWS, _LEAST_TOKENS = 2**20, 4, 16
# A larger product [r, V] is left to `linear_gumbel_topk`, which makes it in chunks.
_MOST_BYTES = 2**26


def worth_packing(weight: Tensor, rows: int, tokens: int) -> bool:
    """Whether packing `weight` [V, d] pays for `tokens` products with `rows` rows: float32, on a CPU with oneDNN."""
    able = weight.device.type == "cpu" and weight.dtype == torch.float32 and torch.backends.mkldnn.is_available()
    enough = weight.numel() >= _LEAST_NUMEL and rows >= _LEAST_ROWS and tokens >= _LEAST_TOKENS
    return able and enough and 4 * rows * weight.shape[0] <= _MOST_BYTES


def pack(weight: Tensor) -> Tensor:
    """A copy of `weight` [V, d] for `packed_product`; opaque, of the same size."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS)


def packed_product(hidden: Tensor, packed: Tensor) -> Tensor:
    """hidden [r, d] @ weight^T -> [r, V]; without a graph."""
    return torch.ops.mkldnn._linear_pointwise(hidden, packed, None, "none", [], "")

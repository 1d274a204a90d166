"""The head's product for the few rows of a token, on a CPU: the weight in oneDNN's own layout.

Such a product should take as long as reading the weight once. A plain matrix product may take several times as long
for 4 to 32 rows. Packing costs about as much as it may save in a few tokens, and a copy of the weight while it is used,
so all three are measured, once a machine (`grade_kernels.common.quickest`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from grade_kernels import Head
from grade_kernels.common.quickest import ADVANTAGE, seconds_of

# oneDNN's layout for 16 rows was as fast as that for the actual number, from 1 to 256, with AVX-512 and with AVX2.
_ROWS = 16
# A larger product [r, V] is left to `linear_gumbel_topk`, which makes it in chunks.
_MOST_BYTES = 2**26


def worth_packing(head: Head, rows: int, tokens: int) -> bool:
    """Whether packing the head's weight [V, d] pays for `tokens` products with `rows` rows: float32, on a CPU with
    oneDNN."""
    weight = head.weight
    able = weight.device.type == "cpu" and weight.dtype == torch.float32 and torch.backends.mkldnn.is_available()
    if not able or not made_at_once(head, rows):
        return False
    hidden, kept = torch.ones(rows, weight.shape[1]), [weight]

    def packing() -> None:
        kept[0] = pack(weight)

    ways = {
        "packing": packing,
        "packed": lambda: head.finish(packed_product(hidden, kept[0])),
        "plain": lambda: head.logits(hidden),
    }
    with torch.inference_mode():
        seconds = seconds_of(f"{rows} rows by a head's {tuple(weight.shape)} {weight.dtype}", ways)
    return seconds["packing"] + tokens * seconds["packed"] <= ADVANTAGE * tokens * seconds["plain"]


def made_at_once(head: Head, rows: int) -> bool:
    """Whether the product [rows, V] is small enough to be made as a whole."""
    return head.dtype.itemsize * rows * head.weight.shape[0] <= _MOST_BYTES


def pack(weight: Tensor) -> Tensor:
    """A copy of `weight` [V, d] for `packed_product`; opaque, of the same size."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS)


def packed_product(hidden: Tensor, packed: Tensor) -> Tensor:
    """hidden [r, d] @ weight^T -> [r, V]; without a graph."""
    return torch.ops.mkldnn._linear_pointwise(hidden, packed, None, "none", [], "")

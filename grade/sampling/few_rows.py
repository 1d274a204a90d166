"""The layers' products for the few rows of a token, on a CPU.

BLAS is made for many rows: with four, a product of a layer took twice as long as reading its weight. The same product
with the weight on the left took half of that on one processor, and on another it may not. So both are measured, once a
machine (`grade.sampling.quickest`), and a layer takes the better one while it is decoded.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from grade.sampling.quickest import quickest


def weight_first(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden [r, d] @ weight^T -> [r, out], multiplied with the weight [out, d] on the left."""
    return (weight @ hidden.T).T.contiguous()


class WeightFirst(nn.Linear):
    """A linear layer that multiplies one position a row by `weight_first`, and everything else as it always does."""

    def forward(self, input: Tensor) -> Tensor:
        if input.dim() != 3 or input.shape[1] != 1:
            return F.linear(input, self.weight, self.bias)
        product = weight_first(input[:, 0], self.weight)
        return (product if self.bias is None else product + self.bias)[:, None]


@contextmanager
def quick_products(modules: Iterable[nn.Module], rows: int) -> Iterator[None]:
    """Let linear layers on a CPU multiply `rows` rows of one position, [rows, 1, d], in the way that is the quickest.

    Args:
        modules: of which `torch.nn.Linear` itself is meant, and no class that is derived from it.
    """
    linear = [x for x in modules if type(x) is nn.Linear and x.weight.device.type == "cpu"]
    changed = [x for x in linear if _is_quicker(x.weight, rows)]
    for module in changed:
        module.__class__ = WeightFirst
    try:
        yield
    finally:
        for module in changed:
            module.__class__ = nn.Linear


def _is_quicker(weight: Tensor, rows: int) -> bool:
    hidden = torch.ones(rows, weight.shape[1], dtype=weight.dtype)
    what = f"{rows} rows by a layer's {tuple(weight.shape)} {weight.dtype}"
    ways = {"linear": lambda: F.linear(hidden, weight), "weight first": lambda: weight_first(hidden, weight)}
    with torch.no_grad():
        return quickest(what, ways) == "weight first"

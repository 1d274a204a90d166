"""The layers' products for the few rows of a token, on a CPU.

BLAS is made for many rows: with four, a product of a layer took twice as long as reading its weight. The same product
with the weight on the left took half of that on one processor, and on another it may not. So both are measured, once a
machine (`grade_kernels.common.quickest`), and a layer takes the better one while it is decoded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from grade.model.frozen_linear import FrozenLinear
from grade_kernels.common.cpu_products import product, weight_first
from grade_kernels.common.quickest import quickest


class WeightFirst(FrozenLinear):
    """A linear layer that multiplies one position a row by `weight_first`, and everything else as it always does."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 3 or x.shape[1] != 1:
            return super().forward(x)
        product = weight_first(x[:, 0], self.weight)
        return (product if self.bias is None else product + self.bias)[:, None]


@contextmanager
def quick_products(modules: Iterable[nn.Module], rows: int) -> Iterator[None]:
    """Let linear layers on a CPU multiply `rows` rows of one position, [rows, 1, d], in the way that is the quickest.

    Args:
        modules: in the order in which a token passes through them. Others than the `FrozenLinear`s among them stay as
            they are.
    """
    layers = [x for x in modules if type(x) is FrozenLinear]
    if not layers or not _weight_first_is_quicker([layer.weight for layer in layers], rows):
        layers = []
    for layer in layers:
        layer.__class__ = WeightFirst
    try:
        yield
    finally:
        for layer in layers:
            layer.__class__ = FrozenLinear


def _weight_first_is_quicker(weights: list[Tensor], rows: int) -> bool:
    """One after the other, as in a token: a weight that was just read would come from a nearer cache than in one."""
    inputs = {(x.shape[1], x.dtype): torch.ones(rows, x.shape[1], dtype=x.dtype) for x in weights}

    def all_of(product: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], None]:
        def run() -> None:
            for weight in weights:
                product(inputs[weight.shape[1], weight.dtype], weight)

        return run

    shapes = Counter((*x.shape, str(x.dtype).removeprefix("torch.")) for x in weights)
    what = f"{rows} rows by layers of {', '.join(f'{n} {a} x {b} {t}' for (a, b, t), n in sorted(shapes.items()))}"
    with torch.inference_mode():
        return quickest(what, {"linear": all_of(product), "weight first": all_of(weight_first)}) == "weight first"

"""Products with a float32 weight on a CPU, by the quicker of torch's two libraries for them.

torch multiplies float32 matrices by MKL, which does not take the widest vectors of every processor: on one with AVX-512
that is not Intel's, oneDNN, which torch brings too, was far faster.  oneDNN may first bring the weight into a
layout of its own, and makes code for every size, so that it pays from some number of rows and some amount of work on.
Both are measured once a machine, in a fraction of a second (`grade_kernels.common.quickest`).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import count

import torch
from torch import Tensor

from grade_kernels.common import quickest

VARIABLE = "GRADE_KERNELS_CPU_PRODUCTS"
"""`mkl` or `onednn` takes that one for every product that both can make."""

# A weight in the caches, the rows that it multiplies, and a weight larger than most caches, the slowest to lay out.
_WEIGHT, _ROWS, _LARGE = (512, 256), 256, (16384, 256)
_ROUNDS = 20
# A size is met as often as this at least: a model's layers have equal ones.
_USES = 8
# As much faster must oneDNN be: where both are about equal, noise would choose.
_GAIN = 1.25


@dataclass(frozen=True)
class Limits:
    """From where on oneDNN is taken: a product of that many rows, and of that many multiplications.

    Powers of two, since times differ from one measurement to the next.
    """

    rows: float
    work: float


_ALWAYS = Limits(1.0, 1.0)


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x [r, i] @ weight.T [i, o] -> [r, o], by the quicker library; without a graph.

    `weight` may be a transposed view.  Where oneDNN multiplies, a copy of the weight may be alive meanwhile.
    """
    if takes_onednn(x, weight):
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return x @ weight.T


# `product` of x [r, i] and the weight as a [i, o] view, for code that torch.compile generates, which takes the library
# when it runs. Without a gradient: for graphs in which gradients are operators too. A custom_op would look at what it
# returns, which takes as long as a small product.
_NAME = "grade_kernels::cpu_product"
torch.library.define(_NAME, "(Tensor x, Tensor weight) -> Tensor")


@torch.library.impl(_NAME, "CPU")
def _compiled(x: Tensor, weight: Tensor) -> Tensor:
    return product(x, weight.T)


@torch.library.register_fake(_NAME)
def _of_shape(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


def weight_first(x: Tensor, weight: Tensor) -> Tensor:
    """x [r, i] @ weight.T -> [r, o], multiplied with the weight [o, i] on the left: for few rows often the quicker."""
    return (weight @ x.T).T.contiguous()


def takes_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether `product` of x [..., i], as [r, i], and `weight` [o, i] is oneDNN's."""
    able = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and x.numel() > 0
    if not able or torch.compiler.is_compiling():  # a compiler makes products its own way
        return False
    rows, least = x.numel() // x.shape[-1], limits()
    return least is not None and rows >= least.rows and rows * weight.numel() >= least.work


def limits() -> Limits | None:
    """Those of this processor and torch; None where oneDNN is never taken.

    Raises
    ------
    ValueError
        As `forced_library` does.
    """
    if not may_take_onednn():
        return None
    return _ALWAYS if forced_library() == "onednn" else measured_limits()


def may_take_onednn() -> bool:
    """Whether some processor would make `product` by oneDNN, with this torch and environment.

    Raises
    ------
    ValueError
        As `forced_library` does.
    """
    return forced_library() != "mkl" and torch.backends.mkldnn.is_available()


def forced_library() -> str:
    """The library that the environment variable names; "" where it names none.

    Raises
    ------
    ValueError
        It has another value.
    """
    forced = os.environ.get(VARIABLE, "")
    if forced not in ("", "mkl", "onednn"):
        raise ValueError(f"{VARIABLE} must be 'mkl' or 'onednn', or unset to measure, got {forced!r}")
    return forced


def restore(recorded: Mapping[str, quickest.Seconds]) -> None:
    """Choose as the process did whose `quickest.record` this is."""
    quickest.restore(recorded)
    measured_limits.cache_clear()


@cache
def measured_limits() -> Limits | None:
    """By times of both libraries on one thread: where several share a busy machine, they wait for each other, and the
    times say nothing."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _by_one_thread()
    finally:
        torch.set_num_threads(threads)


def _by_one_thread() -> Limits | None:
    with torch.no_grad():
        weight, large = torch.ones(_WEIGHT), torch.ones(_LARGE)
        rows = torch.ones(_ROWS + _ROUNDS + 2, _WEIGHT[1])
        sizes = count(_ROWS + 1)

        def onednn(n: int, weight: Tensor) -> Tensor:
            return torch.ops.mkldnn._linear_pointwise(rows[:n], weight, None, "none", [], "")

        ways: dict[str, Callable[[], Tensor]] = {
            "mkl": lambda: rows[:_ROWS] @ weight.T,
            "onednn": lambda: onednn(_ROWS, weight),
            "onednn, of a new size": lambda: onednn(next(sizes), weight),
            "onednn, one row by a large weight": lambda: onednn(1, large),  # all that a weight costs by itself
        }
        seconds = quickest.seconds_of(f"{_ROWS} rows by {_WEIGHT}, one by {_LARGE}, float32", ways, _ROUNDS)
    mkl, other, first, one = (seconds[name] for name in ways)
    if mkl <= _GAIN * other:  # both are 0 by a clock that is too coarse
        return None
    saved = (mkl - other) / (_ROWS * math.prod(_WEIGHT))  # a multiplication
    by_entry, making = one / math.prod(_LARGE), max(first - other, 0.0)
    return Limits(_power_above(by_entry / saved), _power_above(making / saved / _USES))


def _power_above(x: float) -> float:
    return 2.0 ** math.ceil(math.log2(max(x, 1.0)))

"""How a kernel is launched, in one place: options, devices, row addresses, and a recorder.

Under `recording()` launches are noted instead of made, which is how `grade_kernels.aot` learns, without a
device, every configuration that the launchers ship: it compiles what they would have launched.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Triton 3.10 changes the default, so it is said.  Fused multiply-adds only ever sharpen a result here: no
# kernel depends on a product being rounded before it is added.
FUSED = {"enable_fp_fusion": True}
# Bytes of the widest load of a thread.
VECTOR_BYTES = 16


class PerVendor(NamedTuple):
    """A constant of a kernel that differs between NVIDIA's devices (and the interpreter) and AMD's."""

    nvidia: int
    amd: int


@dataclass(frozen=True)
class Launch:
    """A launch that was recorded: the kernel, its grid, its arguments in order, and what is fixed."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    num_warps: int
    max_registers: int | None
    constants: dict[str, Any]


_recorded: list[Launch] | None = None


@contextlib.contextmanager
def recording() -> Iterator[list[Launch]]:
    """Collect launches instead of making them; outputs are then left unwritten."""
    global _recorded
    before, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = before


def launch(
    kernel: Any, grid: tuple[int, ...], *args: Any, num_warps: int, max_registers: int | None = None, **constants: Any
) -> None:
    """kernel[grid](*args, **constants) on the device of the first tensor; an empty grid is no launch.

    Positional arguments are tensors (or None) and numbers that may change from call to call; `constants`
    are the constexpr ones, each value of which is a compilation; one may be a `PerVendor`.  `max_registers` a
    thread bounds NVIDIA's compiler, which otherwise takes as many as help one warp, though fewer warps then fit.
    """
    if _recorded is not None:
        _recorded.append(Launch(kernel, grid, args, num_warps, max_registers, constants))
        return
    if 0 in grid:
        return
    device = next(a.device for a in args if isinstance(a, Tensor))
    here = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with here:
        options = compile_options(num_warps, max_registers, warp_size(device), torch.version.hip is not None)
        kernel[grid](*args, **options, **constants_for(constants, torch.version.hip is not None))


def compile_options(num_warps: int, max_registers: int | None, lanes_per_warp: int, hip: bool) -> dict[str, Any]:
    """The compiler's options for a launch on a device with warps of `lanes_per_warp`."""
    options = {"num_warps": warps_for(num_warps, lanes_per_warp), **FUSED}
    return options if hip or max_registers is None else {**options, "maxnreg": max_registers}


def constants_for(constants: dict[str, Any], hip: bool) -> dict[str, Any]:
    """A launch's constants on a device of either vendor."""

    def value(constant: Any) -> Any:
        if isinstance(constant, PerVendor):
            return constant.amd if hip else constant.nvidia
        return constant

    return {name: value(constant) for name, constant in constants.items()}


def warps_for(num_warps: int, lanes_per_warp: int) -> int:
    """Launchers count warps of 32 lanes; where a warp has 64 (gfx9), half as many hold the same lanes."""
    return max(1, num_warps * 32 // lanes_per_warp)


@cache
def warp_size(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).warp_size if device.type == "cuda" else 32


@cache
def multiprocessors(device: torch.device) -> int:
    """How many the device has; the interpreter pretends to have four."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


class RowAddresses(NamedTuple):
    """x [..., V] as N rows: row r starts at (r // inner) * outer_stride + (r % inner) * inner_stride."""

    tensor: Tensor
    n: int
    inner: int
    outer_stride: int
    inner_stride: int

    @property
    def strides(self) -> tuple[int, int, int]:
        """What `device.row_start` takes."""
        return self.inner, self.outer_stride, self.inner_stride


def row_addresses(x: Tensor) -> RowAddresses:
    """Addresses of the rows of x without a copy, where two strides can say them and entries are adjacent.

    That covers contiguous tensors, slices along one leading dimension (`logits[:, :-1]`) and expanded ones.
    Others are copied.
    """
    n = math.prod(x.shape[:-1])
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        x = x.contiguous()
    groups: list[tuple[int, int]] = []  # (size, stride) of leading dimensions, merged where they can be
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if size == 1:
            continue
        if groups and groups[-1][1] == size * stride:
            groups[-1] = (groups[-1][0] * size, stride)
        else:
            groups.append((size, stride))
    if len(groups) > 2:
        return row_addresses(x.contiguous())
    # A single row has no stride; its length stands in, which is as divisible by 16 as the stride of more rows.
    outer = groups[0][1] if groups else x.shape[-1]
    inner, inner_stride = groups[1] if len(groups) == 2 else (1, 0)
    return RowAddresses(x, n, inner, outer, inner_stride)


def as_tensor(rows: Any) -> Tensor:
    """The tensor [..., V] behind `torch_ops.chunks.Rows`."""
    return rows if isinstance(rows, Tensor) else rows.tensor


def vector_width(*tensors: Tensor) -> int:
    """Adjacent entries that a thread loads at once from rows of all of the tensors: a power of two.

    That is what 16 bytes hold of the narrowest dtype, unless rows begin off that alignment (an odd vocabulary, a
    view that is one entry further).  Wider than its loads, a lane would be spread over several threads.
    """
    width = VECTOR_BYTES // min(t.element_size() for t in tensors)
    for rows in map(row_addresses, tensors):
        # The address itself: memory that comes from elsewhere need not begin where torch's would.
        first = rows.tensor.data_ptr() // rows.tensor.element_size()
        for start in (first, rows.outer_stride, rows.inner_stride):
            width = min(width, start & -start) if start else width
    return width


def store_width(*tensors: Tensor) -> int:
    """`vector_width` where a thread also stores what it loads, which it does by 16 bytes at most: those of the widest
    dtype.  Of a wider share entries would have to change threads before they are stored.
    """
    return min(vector_width(*tensors), VECTOR_BYTES // max(t.element_size() for t in tensors))


def words(seed: int) -> tuple[int, int]:
    """The two 32-bit words of a seed as signed integers, so that every seed has one type (no recompilation)."""
    low, high = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    return low - (low >> 31 << 32), high - (high >> 31 << 32)


def split_tau(tau: float | Tensor) -> tuple[float, Tensor | None]:
    """A temperature as the two arguments of a kernel: a number, or where it lies."""
    return (1.0, tau) if isinstance(tau, Tensor) else (float(tau), None)


def next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()

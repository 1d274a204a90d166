"""Kullback-Leibler divergence of logits rows in one pass, and its gradients in one more; see `online`."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from grade_kernels.common.chunks import Rows
from grade_kernels.common.stats import KLStats
from grade_kernels.triton_ops import device, half, online
from grade_kernels.triton_ops.launch import PerVendor, as_tensor, launch, row_addresses, store_width, vector_width

_WARPS = 8
# Entries of each side that a thread takes per tile: more share the work of moving a lane's centre, fewer leave
# registers.
_STATS_ENTRIES = 16
_GRAD_ENTRIES = 8
# Tiles that a turn of the 16-bit loop takes. AMD's compiler mixes them, in twice the registers.
_STATS_TURNS = PerVendor(nvidia=2, amd=1)
# Tiles of a row that one program of the gradient kernel takes.
_GRAD_TILES = 8


@triton.jit(do_not_specialize=["n", "p_inner", "q_inner"])
def _stats_kernel(
    p, q, out, n, vocab, p_inner, p_outer, p_stride, q_inner, q_outer, q_stride,
    LANES: tl.constexpr, WIDTH: tl.constexpr, STEPS: tl.constexpr, TURNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    p = device.aligned(p, device.row_start(row, p_inner, p_outer, p_stride), WIDTH)
    q = device.aligned(q, device.row_start(row, q_inner, q_outer, q_stride), WIDTH)
    if p.dtype.element_ty.primitive_bitwidth + q.dtype.element_ty.primitive_bitwidth == 32:
        kl, peak_p, norm_p, peak_q, norm_q, shift = half.kl_row(p, q, vocab, LANES, WIDTH, STEPS, TURNS)
    else:
        kl, peak_p, norm_p, peak_q, norm_q, shift, _ = online.kl_row(p, q, vocab, 0, LANES, WIDTH, STEPS)
    out += row
    n = n.to(tl.int64)
    tl.store(out, kl)
    tl.store(out + n, peak_p)
    tl.store(out + 2 * n, norm_p)
    tl.store(out + 3 * n, peak_q)
    tl.store(out + 4 * n, norm_q)
    tl.store(out + 5 * n, shift)


@triton.jit(
    do_not_specialize=["p_inner", "q_inner", "out_p_inner", "out_q_inner"],
    # One scalar a row is read of each; where the rows of a chunk begin must not compile again.
    do_not_specialize_on_alignment=["kl", "peak_p", "norm_p", "peak_q", "norm_q", "shift", "weights"],
)
def _grads_kernel(
    p, q, kl, peak_p, norm_p, peak_q, norm_q, shift, weights, out_p, out_q, inverse_cap, vocab,
    p_inner, p_outer, p_stride, q_inner, q_outer, q_stride, out_p_inner, out_p_outer, out_p_stride,
    out_q_inner, out_q_outer, out_q_stride,
    TILES: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1).to(tl.int64) * (TILES * LANES * WIDTH * STEPS)
    p = device.aligned(p, device.row_start(row, p_inner, p_outer, p_stride) + first, WIDTH)
    q = device.aligned(q, device.row_start(row, q_inner, q_outer, q_stride) + first, WIDTH)
    if out_p is not None:
        out_p = device.aligned(out_p, device.row_start(row, out_p_inner, out_p_outer, out_p_stride) + first, WIDTH)
    if out_q is not None:
        out_q = device.aligned(out_q, device.row_start(row, out_q_inner, out_q_outer, out_q_stride) + first, WIDTH)
    weight = None
    if weights is not None:
        weight = tl.load(weights + row).to(tl.float32)
    here = tl.minimum(vocab - first, TILES * LANES * WIDTH * STEPS)
    online.write_kl_grads(
        p, q, out_p, out_q, here, weight, inverse_cap,
        tl.load(kl + row), tl.load(peak_p + row), tl.load(norm_p + row), tl.load(peak_q + row), tl.load(norm_q + row),
        tl.load(shift + row), LANES, WIDTH, STEPS,
    )  # fmt: skip


def _steps(width: int) -> int:
    # Entries that are not adjacent need an address each.
    return (_STATS_ENTRIES if width > 1 else _STATS_ENTRIES // 2) // width


def kl_stats(p_logits: Rows, q_logits: Rows, dtype: torch.dtype) -> KLStats:
    """KL(p || q) in nats of logits [N, V], computed in float32, which `dtype` is.

    Both -inf: the entry does not count.  p = 0 < q: it contributes q.  p > 0 = q: the row is +inf.
    """
    return KLStats(*_kl_stats(as_tensor(p_logits), as_tensor(q_logits)).unbind())


def kl_grads(
    p_logits: Rows,
    q_logits: Rows,
    stats: KLStats,
    row_weights: Tensor | None,
    out_p: Tensor | None,
    out_q: Tensor | None,
    softcap: float | None = None,
) -> None:
    """row_weights * dKL/dp_logits = p (-x - KL) into out_p, and dKL/dq_logits = q - p into out_q, [N, V].

    The outs may be the logits themselves.  With `softcap` the gradient is that before the soft cap which
    made the logits.  A row of weight 0 gets gradient 0 even where KL is infinite.  No weights means 1.
    """
    if out_p is None and out_q is None:
        return
    _kl_grads(as_tensor(p_logits), as_tensor(q_logits), *stats, row_weights, out_p, out_q, softcap)


@torch.library.custom_op("grade_kernels::kl_stats", mutates_args=())
def _kl_stats(p: Tensor, q: Tensor) -> Tensor:
    """The fields of KLStats, [6, N], of logits [..., V]."""
    a, b = row_addresses(p), row_addresses(q)
    out = torch.empty(len(KLStats._fields), a.n, dtype=torch.float32, device=p.device)
    width = vector_width(a.tensor, b.tensor)
    launch(
        _stats_kernel, (a.n,), a.tensor, b.tensor, out, a.n, p.shape[-1], *a.strides, *b.strides,
        num_warps=_WARPS, LANES=32 * _WARPS, WIDTH=width, STEPS=_steps(width), TURNS=_STATS_TURNS,
    )  # fmt: skip
    return out


@_kl_stats.register_fake
def _(p: Tensor, q: Tensor) -> Tensor:
    return p.new_empty(len(KLStats._fields), math.prod(p.shape[:-1]), dtype=torch.float32)


@torch.library.custom_op("grade_kernels::kl_grads", mutates_args=("out_p", "out_q"))
def _kl_grads(
    p: Tensor,
    q: Tensor,
    kl: Tensor,
    peak_p: Tensor,
    norm_p: Tensor,
    peak_q: Tensor,
    norm_q: Tensor,
    shift: Tensor,
    row_weights: Tensor | None,
    out_p: Tensor | None,
    out_q: Tensor | None,
    softcap: float | None,
) -> None:
    a, b = row_addresses(p), row_addresses(q)
    out_a, out_b = (a if out is None else row_addresses(out) for out in (out_p, out_q))
    stats = [stat.contiguous() for stat in (kl, peak_p, norm_p, peak_q, norm_q, shift)]
    weights = None if row_weights is None else row_weights.contiguous()
    vocab, width = p.shape[-1], store_width(a.tensor, b.tensor, *(x for x in (out_p, out_q) if x is not None))
    tile = 32 * _WARPS * _GRAD_ENTRIES
    launch(
        _grads_kernel, (a.n, triton.cdiv(vocab, tile * _GRAD_TILES)), a.tensor, b.tensor, *stats, weights,
        out_p, out_q, None if softcap is None else 1.0 / softcap, vocab,
        *a.strides, *b.strides, *out_a.strides, *out_b.strides,
        num_warps=_WARPS, TILES=_GRAD_TILES, LANES=32 * _WARPS, WIDTH=width, STEPS=_GRAD_ENTRIES // width,
    )  # fmt: skip


@_kl_grads.register_fake
def _(*_: Any) -> None:
    return None

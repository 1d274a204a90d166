"""The dense scatter of a row's candidates, and the backward pass of their weights."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from grade_kernels.common.environment import interpreting
from grade_kernels.triton_ops.launch import VECTOR_BYTES, launch, next_power_of_2, split_tau
from grade_kernels.triton_ops.noise import softmax_vjp

_WARPS = 8
# Vectors of zeros that a thread stores in a step.
_STEPS = 4
# Candidates that a program stores in a step, at most.
_CANDIDATES = 1024
INTERPRETED = tl.constexpr(interpreting())


def weights_vjp(weights: Tensor, grad: Tensor, tau: float | Tensor) -> Tensor:
    """J(w) v / tau [N, k], in the dtype of `weights`."""
    return _weights_vjp(weights, grad, *split_tau(tau))


def scatter(ids: Tensor, values: Tensor, vocab: int, dtype: torch.dtype) -> Tensor:
    """Dense [N, vocab] in `dtype`: the values [N, k] at their ids, which are distinct within a row, else 0."""
    return _scatter(ids, values, vocab, dtype)


@triton.jit
def store_rounded(out, x, mask):
    """Store float32 x in the dtype of `out`, rounded to the nearest, even on a tie.  Devices do; Triton's
    interpreter cuts bfloat16 off, so there the bits are rounded first."""
    if INTERPRETED and out.dtype.element_ty == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x != x, x, bits.to(tl.float32, bitcast=True))
    tl.store(out, x.to(out.dtype.element_ty), mask=mask)


@torch.library.custom_op("grade_kernels::weights_vjp", mutates_args=())
def _weights_vjp(weights: Tensor, grad: Tensor, tau: float, tau_at: Tensor | None) -> Tensor:
    n, k = weights.shape
    out = torch.empty(n, k, dtype=weights.dtype, device=weights.device)
    row = next_power_of_2(k)
    launch(
        _weights_vjp_kernel,
        (n,),
        weights.contiguous(),
        grad.contiguous(),
        out,
        k,
        tau,
        tau_at,
        num_warps=max(1, min(16, row // 256)),
        KP=row,
    )
    return out


@_weights_vjp.register_fake
def _(weights: Tensor, *_: Any) -> Tensor:
    return weights.new_empty(weights.shape)


@triton.jit(do_not_specialize=["k", "tau"], do_not_specialize_on_alignment=["tau_at"])
def _weights_vjp_kernel(weights, grad, out, k, tau, tau_at, KP: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, KP)
    valid = lane < k
    w = tl.load(weights + row * k + lane, mask=valid, other=0.0).to(tl.float32)
    v = tl.load(grad + row * k + lane, mask=valid, other=0.0).to(tl.float32)
    if tau_at is not None:
        tau = tl.load(tau_at).to(tl.float32)
    store_rounded(out + row * k + lane, softmax_vjp(w, v) / tau, valid)


@torch.library.custom_op("grade_kernels::scatter", mutates_args=())
def _scatter(ids: Tensor, values: Tensor, vocab: int, dtype: torch.dtype) -> Tensor:
    n, k = ids.shape
    out = torch.empty(n, vocab, dtype=dtype, device=ids.device)
    launch(
        _scatter_kernel,
        (n,),
        ids.contiguous(),
        values.contiguous(),
        out,
        vocab,
        k,
        num_warps=_WARPS,
        TILE=32 * _WARPS * _STEPS * VECTOR_BYTES // dtype.itemsize,
        CANDIDATES=min(_CANDIDATES, next_power_of_2(k)),
    )
    return out


@_scatter.register_fake
def _(ids: Tensor, values: Tensor, vocab: int, dtype: torch.dtype) -> Tensor:
    return ids.new_empty(ids.shape[0], vocab, dtype=dtype)


@triton.jit(do_not_specialize=["k"])
def _scatter_kernel(ids, values, out, vocab, k, TILE: tl.constexpr, CANDIDATES: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    out += row * vocab
    ids += row * k
    values += row * k
    column = tl.arange(0, TILE)
    zeros = tl.zeros([TILE], out.dtype.element_ty)
    full = vocab // TILE * TILE
    for start in range(0, full, TILE):
        tl.store(out + start + column, zeros)
    if vocab % TILE != 0:
        tl.store(out + full + column, zeros, mask=full + column < vocab)
    tl.debug_barrier()  # the zeros lie before a value does
    for start in range(0, k, CANDIDATES):
        candidate = start + tl.arange(0, CANDIDATES)
        inside = candidate < k
        place = tl.load(ids + candidate, mask=inside, other=0)
        value = tl.load(values + candidate, mask=inside, other=0.0).to(tl.float32)
        store_rounded(out + place, value, inside)

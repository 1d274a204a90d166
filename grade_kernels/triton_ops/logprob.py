"""Log-sum-exp, token log-probability and entropy of logits rows, each in one pass; see `online`."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from grade_kernels.common.chunks import Rows
from grade_kernels.common.stats import TokenStats
from grade_kernels.triton_ops import device, online
from grade_kernels.triton_ops.launch import as_tensor, launch, row_addresses, store_width, vector_width

_WARPS = 8
_STATS_ENTRIES = 32  # of a thread, per tile
_GRAD_ENTRIES = 16
# Tiles of a row that one program of the gradient kernel takes.
_GRAD_TILES = 4


@triton.jit(do_not_specialize=["n", "inner"], do_not_specialize_on_alignment=["tokens"])
def _stats_kernel(
    x, tokens, out, n, vocab, inner, outer, stride,
    LANES: tl.constexpr, WIDTH: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x = device.aligned(x, device.row_start(row, inner, outer, stride), WIDTH)
    peak, norm, entropy = online.lse_row(x, vocab, LANES, WIDTH, STEPS)
    out += row
    n = n.to(tl.int64)
    logprob = 0.0
    if tokens is not None:
        logprob = (tl.load(x + tl.load(tokens + row)).to(tl.float32) - peak) - norm
    tl.store(out, logprob)
    tl.store(out + n, entropy)
    tl.store(out + 2 * n, peak)
    tl.store(out + 3 * n, norm)


@triton.jit(
    do_not_specialize=["inner", "out_inner"],
    # One scalar a row is read of each; where the rows of a chunk begin must not compile again.
    do_not_specialize_on_alignment=["tokens", "entropy", "peak", "norm", "d_logprob", "d_entropy"],
)
def _grad_kernel(
    x, tokens, entropy, peak, norm, d_logprob, d_entropy, out, inverse_cap, vocab,
    inner, outer, stride, out_inner, out_outer, out_stride,
    TILES: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1).to(tl.int64) * (TILES * LANES * WIDTH * STEPS)
    x = device.aligned(x, device.row_start(row, inner, outer, stride) + first, WIDTH)
    out = device.aligned(out, device.row_start(row, out_inner, out_outer, out_stride) + first, WIDTH)
    token = tl.load(tokens + row) - first
    entropy, peak, norm = tl.load(entropy + row), tl.load(peak + row), tl.load(norm + row)
    d_logprob = tl.load(d_logprob + row).to(tl.float32)
    d_entropy = tl.load(d_entropy + row).to(tl.float32)
    offsets = device.tile_offsets(LANES, WIDTH, STEPS)
    left = vocab - first
    for i in range(0, tl.minimum(TILES, tl.cdiv(left, LANES * WIDTH * STEPS))):
        ids = i * (LANES * WIDTH * STEPS) + offsets
        logits = tl.load(x + ids, mask=ids < left, other=0.0).to(tl.float32)
        logp = (logits - peak) - norm
        prob = device.exp(logp)
        # 0 log 0 = 0; a NaN row keeps its NaN through prob.
        logp = tl.where(logp > float("-inf"), logp, 0.0)
        grad = tl.where(ids == token, d_logprob, 0.0) - prob * (d_logprob + d_entropy * (logp + entropy))
        if inverse_cap is not None:
            grad = online.uncap(grad, logits, inverse_cap)
        tl.store(out + ids, grad, mask=ids < left)


def token_stats(logits: Rows, tokens: Tensor | None, dtype: torch.dtype) -> TokenStats:
    """Log-probability, entropy and log-sum-exp of logits [N, V], computed in float32, which `dtype` is."""
    return TokenStats(*_token_stats(as_tensor(logits), tokens).unbind())


def token_stats_grad(
    logits: Rows,
    tokens: Tensor,
    stats: TokenStats,
    d_logprob: Tensor,
    d_entropy: Tensor,
    out: Tensor,
    softcap: float | None = None,
) -> None:
    """out [N, V] = d_logprob (onehot - p) - d_entropy p (log p + entropy).

    `out` may be `logits` itself.  With `softcap` the gradient is that before the soft cap which made the
    logits.
    """
    rest = (stats.entropy, stats.peak, stats.norm, d_logprob, d_entropy)
    _token_stats_grad(as_tensor(logits), tokens, *rest, out, softcap)


@torch.library.custom_op("grade_kernels::token_stats", mutates_args=())
def _token_stats(logits: Tensor, tokens: Tensor | None) -> Tensor:
    """The fields of TokenStats, [4, N], of logits [..., V]; tokens [N]."""
    x = row_addresses(logits)
    out = torch.empty(len(TokenStats._fields), x.n, dtype=torch.float32, device=logits.device)
    ids = None if tokens is None else tokens.contiguous()
    launch(_stats_kernel, (x.n,), x.tensor, ids, out, x.n, logits.shape[-1], *x.strides, **_stats_layout(x.tensor))
    return out


@_token_stats.register_fake
def _(logits: Tensor, tokens: Tensor | None) -> Tensor:
    return logits.new_empty(len(TokenStats._fields), math.prod(logits.shape[:-1]), dtype=torch.float32)


@torch.library.custom_op("grade_kernels::token_stats_grad", mutates_args=("out",))
def _token_stats_grad(
    logits: Tensor,
    tokens: Tensor,
    entropy: Tensor,
    peak: Tensor,
    norm: Tensor,
    d_logprob: Tensor,
    d_entropy: Tensor,
    out: Tensor,
    softcap: float | None,
) -> None:
    x, y = row_addresses(logits), row_addresses(out)
    per_row = [t.contiguous() for t in (tokens, entropy, peak, norm, d_logprob, d_entropy)]
    vocab, width, tile = logits.shape[-1], store_width(x.tensor, out), 32 * _WARPS * _GRAD_ENTRIES
    launch(
        _grad_kernel, (x.n, triton.cdiv(vocab, tile * _GRAD_TILES)), x.tensor, *per_row, out,
        None if softcap is None else 1.0 / softcap, vocab, *x.strides, *y.strides,
        num_warps=_WARPS, TILES=_GRAD_TILES, LANES=32 * _WARPS, WIDTH=width, STEPS=_GRAD_ENTRIES // width,
    )  # fmt: skip


@_token_stats_grad.register_fake
def _(*_: Any) -> None:
    return None


def _stats_layout(logits: Tensor) -> dict[str, int]:
    width = vector_width(logits)
    return {"num_warps": _WARPS, "LANES": 32 * _WARPS, "WIDTH": width, "STEPS": _STATS_ENTRIES // width}

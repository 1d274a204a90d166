"""Weighted sums and dot products with k rows of a [V, d] table for each of N rows, and sums by vocabulary id.

All three move each gathered table row once, in the widest loads there are, straight into float32 registers.
No [N, k, d] array is built.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from grade_kernels.triton_ops.launch import launch, next_power_of_2, vector_width

# Table rows that a thread of weighted_sum has under way at once.
_UNROLL = 8
# Candidates of a tile of dot products, and warps that share them: a thread has 8 loads under way.
TILE_WARPS, TILE_CANDIDATES = 4, 32
# Entries of a segment that are added at once: steps of a warp, warps, and columns of a program.
_SEGMENT_STEPS, _SEGMENT_WARPS, _SEGMENT_COLUMNS = 4, 4, 512


def weighted_sum(weights: Tensor, indices: Tensor, table: Tensor) -> Tensor:
    """sum_j weights[n, j] table[indices[n, j]] -> float32 [N, d]."""
    return _weighted_sum(weights, indices, table)


def candidate_dots(grad: Tensor, indices: Tensor, table: Tensor) -> Tensor:
    """<grad[n], table[indices[n, j]]> -> float32 [N, k]."""
    return summed_dots([grad], [table], indices)


def scatter_sum(weights: Tensor | None, indices: Tensor, rows: Tensor, vocab: int) -> Tensor:
    """out[v] = sum over indices[n, j] == v of weights[n, j] rows[n] -> float32 [V, d]; weights None means 1.

    The entries are sorted by id, and each id's segment is summed by one program in an order that depends on
    its length alone: the result is deterministic.
    """
    return _scatter_sum(weights, indices, rows, vocab)


@torch.library.custom_op("grade_kernels::weighted_sum", mutates_args=())
def _weighted_sum(weights: Tensor, indices: Tensor, table: Tensor) -> Tensor:
    (n, k), d = indices.shape, table.shape[1]
    out = torch.empty(n, d, dtype=torch.float32, device=table.device)
    table, stride = with_row_stride(table)
    # A program's columns are one vector for each of its threads; the widest block that wastes no more than
    # the narrowest.
    narrow = 32 * vector_width(table)
    warps = next((w for w in (4, 2) if -(-d // (w * narrow)) * w == -(-d // narrow)), 1)
    columns = warps * narrow
    blocks = -(-d // columns)
    launch(
        _weighted_sum_kernel, (n * blocks,), weights.contiguous(), indices.contiguous(), table, out, stride, d, k, blocks,
        num_warps=warps, COLUMNS=columns, UNROLL=_UNROLL,
    )
    return out


@_weighted_sum.register_fake
def _(weights: Tensor, indices: Tensor, table: Tensor) -> Tensor:
    return table.new_empty(indices.shape[0], table.shape[1], dtype=torch.float32)


@triton.jit(do_not_specialize=["k", "blocks"])
def _weighted_sum_kernel(
    weights, ids, table, out, table_stride, d, k, blocks, COLUMNS: tl.constexpr, UNROLL: tl.constexpr
):
    program = tl.program_id(0).to(tl.int64)
    row, block = program // blocks, program % blocks
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < d
    table += column
    weights += row * k
    ids += row * k
    acc = tl.zeros([COLUMNS], tl.float32)
    full = k // UNROLL * UNROLL
    for start in range(0, full, UNROLL):
        for step in tl.static_range(UNROLL):
            row_of_table = tl.load(ids + start + step) * table_stride
            weight = tl.load(weights + start + step).to(tl.float32)
            acc += weight * tl.load(table + row_of_table, mask=inside, other=0.0).to(tl.float32)
    for j in range(full, k):
        row_of_table = tl.load(ids + j) * table_stride
        weight = tl.load(weights + j).to(tl.float32)
        acc += weight * tl.load(table + row_of_table, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * d + column, acc, mask=inside)


@torch.library.custom_op("grade_kernels::candidate_dots", mutates_args=())
def summed_dots(grads: Sequence[Tensor], tables: Sequence[Tensor], ids: Tensor) -> Tensor:
    """sum over models of <grad[n], table[ids[n, j]]> -> float32 [N, k]; each launch adds to the ones before."""
    out = torch.empty(ids.shape, dtype=torch.float32, device=ids.device)
    ids = ids.contiguous()
    for number, (grad, table) in enumerate(zip(grads, tables, strict=True)):
        add_dots(grad, table, ids, out, add=number > 0)
    return out


@summed_dots.register_fake
def _(grads: Sequence[Tensor], tables: Sequence[Tensor], ids: Tensor) -> Tensor:
    return ids.new_empty(ids.shape, dtype=torch.float32)


def add_dots(grad: Tensor, table: Tensor, ids: Tensor, out: Tensor, add: bool) -> None:
    """Write one model's dot products to `out` float32 [N, k], or add them to it; ids [N, k] contiguous."""
    (n, k), d = ids.shape, table.shape[1]
    (grad, grad_stride), (table, table_stride) = with_row_stride(grad), with_row_stride(table)
    blocks = -(-k // TILE_CANDIDATES)
    launch(
        _dots_kernel, (n * blocks,), grad, table, ids, out, grad_stride, table_stride, d, k, blocks,
        num_warps=TILE_WARPS, ADD=add, CANDIDATES=TILE_CANDIDATES, **dots_tile(table),
    )


def dots_tile(table: Tensor) -> dict[str, int]:
    """Threads along a table row, and entries of each thread's load."""
    width = vector_width(table)
    return {"LANES": min(32, next_power_of_2(-(-table.shape[1] // width))), "WIDTH": width}


@triton.jit
def tile_dots(
    grad, table, ids, d, table_stride, CANDIDATES: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr
):
    """<grad, table[ids]> for a tile of ids int64 [CANDIDATES]: float32 [CANDIDATES].

    `grad` points to a row.  Each lane adds up its own entries and the lanes meet after the loop, so nothing
    in the loop waits for another thread.
    """
    COLUMNS: tl.constexpr = LANES * WIDTH
    lane = tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    table += (ids * table_stride)[:, None, None] + lane[None, :, :]
    grad += lane
    acc = tl.zeros([CANDIDATES, LANES], tl.float32)
    for start in range(0, d // COLUMNS * COLUMNS, COLUMNS):
        g = tl.load(grad + start).to(tl.float32)
        acc += tl.sum(tl.load(table + start).to(tl.float32) * g[None, :, :], axis=2)
    if d % COLUMNS != 0:
        start = d // COLUMNS * COLUMNS
        inside = start + lane < d
        g = tl.load(grad + start, mask=inside, other=0.0).to(tl.float32)
        e = tl.load(table + start, mask=inside[None, :, :], other=0.0).to(tl.float32)
        acc += tl.sum(e * g[None, :, :], axis=2)
    return tl.sum(acc, axis=1)


@triton.jit(do_not_specialize=["k", "blocks"])
def _dots_kernel(
    grad, table, ids, out, grad_stride, table_stride, d, k, blocks,
    ADD: tl.constexpr, CANDIDATES: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    row, block = program // blocks, program % blocks
    candidate = block * CANDIDATES + tl.arange(0, CANDIDATES)
    inside = candidate < k
    out += row * k + candidate
    tile_ids = tl.load(ids + row * k + candidate, mask=inside, other=0)
    v = tile_dots(grad + row * grad_stride, table, tile_ids, d, table_stride, CANDIDATES, LANES, WIDTH)
    if ADD:
        v += tl.load(out, mask=inside, other=0.0)
    tl.store(out, v, mask=inside)


@torch.library.custom_op("grade_kernels::scatter_sum", mutates_args=())
def _scatter_sum(weights: Tensor | None, indices: Tensor, rows: Tensor, vocab: int) -> Tensor:
    d, k = rows.shape[1], indices.shape[1]
    out = torch.empty(vocab, d, dtype=torch.float32, device=rows.device)
    # Ids fit into 32 bits, and half the bits are half the passes of a radix sort.
    sorted_ids, order = torch.sort(indices.reshape(-1).to(torch.int32), stable=True)
    bounds = torch.searchsorted(sorted_ids, torch.arange(vocab + 1, dtype=torch.int32, device=rows.device))
    rows, stride = with_row_stride(rows)
    columns = min(_SEGMENT_COLUMNS, next_power_of_2(d))
    blocks = -(-d // columns)
    launch(
        _scatter_sum_kernel, (vocab * blocks,), None if weights is None else weights.contiguous(), rows, order, bounds,
        out, stride, d, blocks,
        num_warps=_SEGMENT_WARPS, K=k, COLUMNS=columns, STEPS=_SEGMENT_STEPS, LANES=_SEGMENT_WARPS,
    )
    return out


@_scatter_sum.register_fake
def _(weights: Tensor | None, indices: Tensor, rows: Tensor, vocab: int) -> Tensor:
    return rows.new_empty(vocab, rows.shape[1], dtype=torch.float32)


@triton.jit(do_not_specialize=["blocks"])
def _scatter_sum_kernel(
    weights, rows, order, bounds, out, stride, d, blocks,
    K: tl.constexpr, COLUMNS: tl.constexpr, STEPS: tl.constexpr, LANES: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    token, block = program // blocks, program % blocks
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < d
    first, stop = tl.load(bounds + token), tl.load(bounds + token + 1)
    total = tl.zeros([COLUMNS], tl.float32)
    if first < stop:
        # One warp a lane: a frequent id has an entry in every row, and this is how several are under way.
        acc = tl.zeros([LANES, COLUMNS], tl.float32)
        entry = tl.arange(0, STEPS)[:, None] * LANES + tl.arange(0, LANES)[None, :]
        for start in range(first, stop, STEPS * LANES):
            here = start + entry < stop
            place = tl.load(order + start + entry, mask=here, other=0)
            address = rows + (place // K * stride)[:, :, None] + column[None, None, :]
            x = tl.load(address, mask=here[:, :, None] & inside[None, None, :], other=0.0).to(tl.float32)
            if weights is not None:
                x *= tl.load(weights + place, mask=here, other=0.0).to(tl.float32)[:, :, None]
            acc += tl.sum(x, axis=0)
        total = tl.sum(acc, axis=0)
    tl.store(out + token * d + column, total, mask=inside)


def with_row_stride(x: Tensor) -> tuple[Tensor, int]:
    """x [rows, columns] and the distance of its rows in entries; copied where columns are not adjacent."""
    if x.stride(1) != 1 and x.shape[1] > 1:
        x = x.contiguous()
    return x, x.stride(0)

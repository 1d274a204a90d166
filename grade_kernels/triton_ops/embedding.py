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

from grade_kernels.triton_ops.launch import launch, next_power_of_2, row_addresses, vector_width

# Table rows that a thread of weighted_sum has under way at once.
_STEPS = 8
# Loads that a thread of a tile of dot products has under way, and the tile's warps.
_TILE_STEPS, _TILE_WARPS = 8, 4
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
    weights, indices = weights.contiguous(), indices.contiguous()
    launch(
        _weighted_sum_kernel,
        (n * blocks,),
        weights,
        indices,
        table,
        out,
        stride,
        d,
        k,
        blocks,
        num_warps=warps,
        COLUMNS=columns,
        STEPS=_STEPS,
    )
    return out


@_weighted_sum.register_fake
def _(weights: Tensor, indices: Tensor, table: Tensor) -> Tensor:
    return table.new_empty(indices.shape[0], table.shape[1], dtype=torch.float32)


@triton.jit(do_not_specialize=["k", "blocks"])
def _weighted_sum_kernel(
    weights, ids, table, out, table_stride, d, k, blocks, COLUMNS: tl.constexpr, STEPS: tl.constexpr
):
    program = tl.program_id(0).to(tl.int64)
    row, block = program // blocks, program % blocks
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    inside = (column < d)[None, :]
    step = tl.arange(0, STEPS)
    table += column[None, :]
    weights += row * k + step
    ids += row * k + step
    acc = tl.zeros([COLUMNS], tl.float32)
    full = k // STEPS * STEPS
    for start in range(0, full, STEPS):
        places = tl.load(ids + start) * table_stride
        x = tl.load(table + places[:, None], mask=inside, other=0.0).to(tl.float32)
        acc += tl.sum(tl.load(weights + start).to(tl.float32)[:, None] * x, axis=0)
    if full < k:
        here = full + step < k
        places = tl.load(ids + full, mask=here, other=0) * table_stride
        x = tl.load(table + places[:, None], mask=inside & here[:, None], other=0.0).to(tl.float32)
        acc += tl.sum(tl.load(weights + full, mask=here, other=0.0).to(tl.float32)[:, None] * x, axis=0)
    tl.store(out + row * d + column, acc, mask=column < d)


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
    tile = dots_tile(table, _TILE_WARPS)
    blocks = -(-k // (tile["STEPS"] * tile["GROUPS"]))
    launch(
        _dots_kernel,
        (n * blocks,),
        grad,
        table,
        ids,
        out,
        grad_stride,
        table_stride,
        d,
        k,
        blocks,
        num_warps=_TILE_WARPS,
        ADD=add,
        **tile,
    )


def dots_tile(table: Tensor, warps: int) -> dict[str, int]:
    """The tile of `tile_dots`: steps, groups of threads with a candidate each, threads of a group, entries of a
    thread's load."""
    width = vector_width(table)
    lanes = min(32, next_power_of_2(-(-table.shape[1] // width)))
    groups = 32 * warps // lanes
    return {"STEPS": max(1, _TILE_STEPS * warps // groups), "GROUPS": groups, "LANES": lanes, "WIDTH": width}


@triton.jit
def tile_dots(
    grad,
    table,
    ids,
    out,
    first,
    k,
    d,
    table_stride,
    ADD: tl.constexpr,
    STEPS: tl.constexpr,
    GROUPS: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """out[j] = <grad, table[ids[j]]> for the STEPS * GROUPS candidates j >= first of a row; with ADD, added to it.

    `grad`, `ids` and `out` point to the row.  A group of LANES threads reads a table row, the same columns of
    all its candidates; each thread adds up its own entries and they meet after the loop, so nothing in the
    loop waits for another thread.
    """
    COLUMNS: tl.constexpr = LANES * WIDTH
    candidate = first + tl.arange(0, STEPS)[:, None] * GROUPS + tl.arange(0, GROUPS)[None, :]
    present = candidate < k
    lane = tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    # Each group has its own copy of the gradient's columns, in the layout of the tile: no exchange.
    lane = tl.broadcast_to(lane[None, :, :], (GROUPS, LANES, WIDTH))
    tile_ids = tl.load(ids + candidate, mask=present, other=0)
    table += (tile_ids * table_stride)[:, :, None, None] + lane[None, :, :, :]
    grad += lane
    acc = tl.zeros([STEPS, GROUPS, LANES], tl.float32)
    full = d // COLUMNS * COLUMNS
    for start in range(0, full, COLUMNS):
        g = tl.load(grad + start).to(tl.float32)
        acc += tl.sum(tl.load(table + start).to(tl.float32) * g[None, :, :, :], axis=3)
    if d % COLUMNS != 0:
        inside = full + lane < d
        g = tl.load(grad + full, mask=inside, other=0.0).to(tl.float32)
        e = tl.load(table + full, mask=inside[None, :, :, :], other=0.0).to(tl.float32)
        acc += tl.sum(e * g[None, :, :, :], axis=3)
    v = tl.sum(acc, axis=2)
    if ADD:
        v += tl.load(out + candidate, mask=present, other=0.0)
    tl.store(out + candidate, v, mask=present)


@triton.jit(do_not_specialize=["k", "blocks"])
def _dots_kernel(
    grad,
    table,
    ids,
    out,
    grad_stride,
    table_stride,
    d,
    k,
    blocks,
    ADD: tl.constexpr,
    STEPS: tl.constexpr,
    GROUPS: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    row, first = program // blocks, program % blocks * (STEPS * GROUPS)
    tile_dots(
        grad + row * grad_stride,
        table,
        ids + row * k,
        out + row * k,
        first,
        k,
        d,
        table_stride,
        ADD,
        STEPS,
        GROUPS,
        LANES,
        WIDTH,
    )


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
        _scatter_sum_kernel,
        (vocab * blocks,),
        None if weights is None else weights.contiguous(),
        rows,
        order,
        bounds,
        out,
        stride,
        d,
        blocks,
        num_warps=_SEGMENT_WARPS,
        K=k,
        COLUMNS=columns,
        STEPS=_SEGMENT_STEPS,
        LANES=_SEGMENT_WARPS,
    )
    return out


@_scatter_sum.register_fake
def _(weights: Tensor | None, indices: Tensor, rows: Tensor, vocab: int) -> Tensor:
    return rows.new_empty(vocab, rows.shape[1], dtype=torch.float32)


@triton.jit(do_not_specialize=["blocks"])
def _scatter_sum_kernel(
    weights,
    rows,
    order,
    bounds,
    out,
    stride,
    d,
    blocks,
    K: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEPS: tl.constexpr,
    LANES: tl.constexpr,
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
    rows = row_addresses(x)
    return rows.tensor, rows.outer_stride

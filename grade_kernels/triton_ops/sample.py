"""The sampler: one launch from the logits to the support, the noise, the weights and the token.

A program takes a row.  Where there are fewer rows than multiprocessors (decoding), a row's first read is split
over several programs in a launch of its own, since no program can wait for another; `topk` describes the rest.

Bytes that must move a row: V entries read once, a tenth of them again at k = 256, and 12 k bytes written.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from grade_kernels.common.chunks import Rows
from grade_kernels.common.sample import Sample, Support
from grade_kernels.triton_ops import bisection, noise, topk
from grade_kernels.triton_ops.device import aligned, row_start
from grade_kernels.triton_ops.launch import (
    as_tensor,
    launch,
    multiprocessors,
    next_power_of_2,
    row_addresses,
    split_tau,
    vector_width,
    words,
)
from grade_kernels.triton_ops.suppress import suppress_bits

# Most groups a row is divided into; more would make the first threshold dearer than what it saves.
_MAX_GROUPS = 4096
_MAX_GROUP = 64  # entries of a group, unless the vocabulary has more than 262,144
_MAX_SPLITS = 64
# Loads of a thread that are under way at a time when groups are read again, of at most 32 entries in all; half of both
# beyond k = 256, where more would spill.
_LOADS = 8
# Scratch of a launch, 16 k bytes a row; 32,768 rows of k = 256 fit.  A larger batch takes several launches.
_SCRATCH_BYTES = 2**27


class Plan(NamedTuple):
    """The shapes of a selection, all powers of two but `groups`."""

    lanes: int
    width: int  # adjacent entries of a lane
    steps: int  # times that in a tile
    tiles: int
    groups: int
    kept: int  # lanes of the support
    warps: int

    @property
    def max_registers(self) -> int | None:
        """128 let two programs of 8 warps share a multiprocessor; for larger supports the bound makes ptxas spill."""
        return 128 if self.kept <= 256 else None

    @property
    def layout(self) -> dict[str, int]:
        """The constants of the first read."""
        tiles = next_power_of_2(self.tiles)
        return {"TILES": tiles, "LANES": self.lanes, "WIDTH": self.width, "STEPS": self.steps}

    @property
    def buffers(self) -> dict[str, int]:
        """The constants of the selection: twice the support is sorted, and twice that is held as far as registers
        reach, which is up to k = 256."""
        sort = 2 * self.kept
        limit = 2 * sort if self.kept <= 256 else sort
        loads = _LOADS // (1 + (self.kept > 256)) * self.lanes // self.steps
        read = min(loads, loads * 4 // self.width, next_power_of_2(self.kept + self.kept // 8))
        return {"READ": max(32, read), "SORT": sort, "LIMIT": max(256, limit), "KEPT": self.kept}


def plan(vocab: int, k: int, logits: Tensor) -> Plan:
    """Groups as large as leaves 4k of them, so that few entries pass the threshold, and at most 4096."""
    warps = 8 if vocab >= 8192 else 4
    lanes = 32 * warps
    group = min(_MAX_GROUP, next_power_of_2(max(1, vocab // (4 * k)) + 1) // 2)
    group = max(group, next_power_of_2(-(-vocab // _MAX_GROUPS)))
    width = min(vector_width(logits), group)
    steps = group // width
    full, rest = divmod(vocab, lanes * group)
    groups = full * lanes + min(lanes, -(-rest // width))
    return Plan(lanes, width, steps, full + (rest > 0), groups, next_power_of_2(max(k, 16)), warps)


_CHANGING = ["first_row", "inner", "k", "groups", "parts_n", "seed_low", "seed_high", "draw", "tau"]


@triton.jit(do_not_specialize=_CHANGING, do_not_specialize_on_alignment=["tau_at"])
def select_kernel(
    logits, inner, outer_stride, inner_stride, first_row, vocab, k, groups,
    bits, given, tokens, keys, seed_low, seed_high, draw, tau, tau_at,
    out_ids, out_values, out_lse, out_weights, out_tokens, out_mass,
    buffer, maxima, parts, parts_n,
    TILES: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr, STEPS: tl.constexpr, READ: tl.constexpr,
    SORT: tl.constexpr, LIMIT: tl.constexpr, KEPT: tl.constexpr, PARTS: tl.constexpr, SAMPLE: tl.constexpr,
):  # fmt: skip
    """A row of logits -> ids, and either values and lse (SAMPLE false) or weights, token and mass.

    `given` ids or None for the top-k; `maxima` and `parts` are what `survey_kernel` left, or None; the temperature is
    read from `tau_at` unless that is None.
    """
    program = tl.program_id(0).to(tl.int64)
    row = program + first_row
    lane = tl.arange(0, KEPT)
    valid = lane < k
    start = aligned(logits, row_start(row, inner, outer_stride, inner_stride), WIDTH)
    if parts is None:
        tiles = tl.cdiv(vocab, LANES * WIDTH * STEPS)
        tops, peak, norm = topk.survey(start, vocab, 0, tiles, bits, None, given is None, TILES, LANES, WIDTH, STEPS)
    else:
        part = tl.arange(0, PARTS)
        at = parts + (row * parts_n + part) * 2
        peaks = tl.load(at, mask=part < parts_n, other=float("-inf"))
        peak, norm = topk.merge_sums(peaks, tl.load(at + 1, mask=part < parts_n, other=0.0))
        if given is None:
            tops = topk.read_maxima(maxima + row * (TILES * LANES), groups, TILES, LANES)
    if given is None:
        # The groups to be read again are noted in the row's place for the ids, which come later.
        hits = (out_ids + row * k).to(tl.pointer_type(tl.int32))
        ids = _top_ids(
            start, vocab, k, groups, bits, peak, norm, tops, hits, buffer + program * LIMIT,
            TILES, LANES, WIDTH, STEPS, READ, SORT, LIMIT, KEPT,
        )  # fmt: skip
    else:
        ids = tl.load(given + row * k + lane, mask=valid, other=0)
    token = tl.full([], 0, tl.int64)
    if tokens is not None:
        token = tl.load(tokens + row)
    ids, values = noise.read_support(start, ids, lane, k, token, bits, tokens is not None)
    tl.store(out_ids + row * k + lane, ids, mask=valid)
    lse = peak + tl.log(norm)
    if SAMPLE:
        key = tl.load(keys + row)
        _sample(
            row, k, valid, lane, ids, values, lse, key, seed_low, seed_high, draw, token, tau, tau_at,
            out_weights, out_tokens, out_mass, tokens is not None,
        )  # fmt: skip
    else:
        tl.store(out_values + row * k + lane, values, mask=valid)
        tl.store(out_lse + row, lse)


@triton.jit
def _top_ids(
    start, vocab, k, groups, bits, peak, norm, maxima, hits, buffer,
    TILES: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr, STEPS: tl.constexpr, READ: tl.constexpr,
    SORT: tl.constexpr, LIMIT: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    """The ids [KEPT] of the k largest entries of a row, in order."""
    T, reached = bisection.threshold(maxima, groups, peak, k)
    T = tl.where(norm != norm, topk.BLOCKED, T)  # a maximum may have missed a NaN: let everything pass
    if bits is not None:  # a maximum of -inf may be that of suppressed ids, which rank below -inf
        T = tl.where(T <= topk.MASKED, topk.BLOCKED, T)
    filled = topk.candidates(
        start, vocab, bits, T, reached, maxima, hits, 2 * k, buffer, TILES, LANES, WIDTH, STEPS, READ, LIMIT
    )
    tl.debug_barrier()  # the buffer is written
    if filled > SORT:
        bisection.narrow(start, vocab, k, bits, T, filled, buffer, LANES, WIDTH, LIMIT)
        filled = k
    entry = tl.arange(0, SORT)
    ids = tl.load(buffer + entry, mask=entry < filled, other=0)
    return topk.key_id(tl.topk(topk.keys_of(start, ids, entry < filled, bits), KEPT))


@triton.jit
def _sample(
    row, k, valid, lane, ids, values, lse, key, seed_low, seed_high, draw, token, tau, tau_at,
    out_weights, out_tokens, out_mass, CONDITIONAL: tl.constexpr,
):  # fmt: skip
    if tau_at is not None:
        tau = tl.load(tau_at).to(tl.float32)
    z = noise.noisy_logits(values, ids, valid, key, seed_low, seed_high, draw, token, CONDITIONAL)
    if not CONDITIONAL:
        token = noise.winner(z, ids, valid)
    tl.store(out_weights + row * k + lane, noise.tempered_softmax(z, valid, tau), mask=valid)
    tl.store(out_tokens + row, token)
    tl.store(out_mass + row, tl.sum(tl.where(valid, tl.exp(values - lse), 0.0), axis=0))


@triton.jit(do_not_specialize=["inner", "parts_n", "per_part"])
def survey_kernel(
    logits, inner, outer_stride, inner_stride, vocab, bits, maxima, parts, parts_n, per_part,
    TILES: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """The first read of a row by `parts_n` programs: group maxima [n, TILES, LANES] unless None, and
    (peak, norm) [n, parts_n, 2]."""
    program = tl.program_id(0).to(tl.int64)
    row, part = program // parts_n, program % parts_n
    start = aligned(logits, row_start(row, inner, outer_stride, inner_stride), WIDTH)
    first = (part * per_part).to(tl.int32)
    last = tl.minimum(first + per_part, tl.cdiv(vocab, LANES * WIDTH * STEPS))
    if maxima is not None:
        maxima += row * (TILES * LANES)
    _, peak, norm = topk.survey(start, vocab, first, last, bits, maxima, maxima is not None, TILES, LANES, WIDTH, STEPS)
    tl.store(parts + program * 2, peak)
    tl.store(parts + program * 2 + 1, norm)


@triton.jit(do_not_specialize=["k", "seed_low", "seed_high", "draw", "tau"], do_not_specialize_on_alignment=["tau_at"])
def sample_kernel(
    values, ids, lse, keys, tokens, k, seed_low, seed_high, draw, tau, tau_at, out_weights, out_tokens, out_mass,
    KEPT: tl.constexpr,
):  # fmt: skip
    """A row of k candidates -> weights, token and mass."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, KEPT)
    valid = lane < k
    support = tl.load(ids + row * k + lane, mask=valid, other=0)
    logits = tl.load(values + row * k + lane, mask=valid, other=float("-inf"))
    token = tl.full([], 0, tl.int64)
    if tokens is not None:
        token = tl.load(tokens + row)
    _sample(
        row, k, valid, lane, support, logits, tl.load(lse + row), tl.load(keys + row), seed_low, seed_high, draw, token,
        tau, tau_at, out_weights, out_tokens, out_mass, tokens is not None,
    )  # fmt: skip


def _launch_selection(
    logits: Tensor,
    k: int,
    suppress: Tensor | None,
    given: Tensor | None,
    tokens: Tensor | None,
    keys: Tensor | None = None,
    numbers: tuple = (0, 0, 0, 1.0, None),
) -> Any:
    """(ids, values, lse); with the `keys` of the noise and `numbers` (seed_low, seed_high, draw, tau, tau_at) it
    samples: (ids, weights, tokens, mass)."""
    given, tokens, keys = (None if x is None else x.contiguous() for x in (given, tokens, keys))
    rows, vocab, device = row_addresses(logits), logits.shape[-1], logits.device
    n, shape = rows.n, plan(vocab, k, rows.tensor)
    bits = suppress_bits(suppress, vocab, device)
    buffer = maxima = parts = None
    at_once = max(n, 1)
    if given is None:
        limit = shape.buffers["LIMIT"]
        at_once = min(at_once, _SCRATCH_BYTES // (4 * limit))
        buffer = torch.empty(at_once, limit, dtype=torch.int32, device=device)

    processors = multiprocessors(device)
    per_part = -(-shape.tiles // min(_MAX_SPLITS, max(1, 2 * processors // max(n, 1))))
    parts_n = -(-shape.tiles // per_part)
    if 0 < n < processors and parts_n > 1:
        parts = torch.empty(n, parts_n, 2, dtype=torch.float32, device=device)
        if given is None:
            maxima = torch.empty(n, shape.layout["TILES"], shape.lanes, dtype=torch.int32, device=device)
        launch(
            survey_kernel, (n * parts_n,), rows.tensor, *rows.strides, vocab, bits, maxima, parts, parts_n, per_part,
            num_warps=shape.warps, **shape.layout,
        )  # fmt: skip

    ids = torch.empty(n, k, dtype=torch.int64, device=device)
    wide = torch.empty(n, k, dtype=torch.float32, device=device)  # values or weights
    narrow = torch.empty(n, dtype=torch.float32, device=device)  # lse or mass
    sampling = keys is not None
    chosen = torch.empty(n, dtype=torch.int64, device=device) if sampling else None
    outs = (None, None, wide, chosen, narrow) if sampling else (wide, narrow, None, None, None)
    for first in range(0, n, at_once):
        launch(
            select_kernel, (min(at_once, n - first),), rows.tensor, *rows.strides, first, vocab, k, shape.groups,
            bits, given, tokens, keys, *numbers, ids, *outs, buffer, maxima, parts, parts_n,
            num_warps=shape.warps, max_registers=shape.max_registers,
            PARTS=_MAX_SPLITS, SAMPLE=sampling, **shape.layout, **shape.buffers,
        )  # fmt: skip
    return (ids, wide, chosen, narrow) if sampling else (ids, wide, narrow)


@torch.library.custom_op("grade_kernels::select", mutates_args=())
def _select(
    logits: Tensor, k: int, suppress: Tensor | None, indices: Tensor | None, tokens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return _launch_selection(logits, k, suppress, indices, tokens)


@_select.register_fake
def _(logits: Tensor, k: int, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    n = math.prod(logits.shape[:-1])
    values = logits.new_empty(n, k, dtype=torch.float32)
    return values.new_empty(n, k, dtype=torch.int64), values, values.new_empty(n)


@torch.library.custom_op("grade_kernels::select_and_sample", mutates_args=())
def _select_and_sample(
    logits: Tensor, k: int, tau: float, tau_at: Tensor | None, keys: Tensor, seed_low: int, seed_high: int, draw: int,
    suppress: Tensor | None, indices: Tensor | None, tokens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return _launch_selection(logits, k, suppress, indices, tokens, keys, (seed_low, seed_high, draw, tau, tau_at))


@_select_and_sample.register_fake
def _(logits: Tensor, k: int, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n = math.prod(logits.shape[:-1])
    weights = logits.new_empty(n, k, dtype=torch.float32)
    ids = weights.new_empty(n, k, dtype=torch.int64)
    return ids, weights, ids.new_empty(n), weights.new_empty(n)


@torch.library.custom_op("grade_kernels::sample", mutates_args=())
def _sample_support(
    values: Tensor, ids: Tensor, lse: Tensor, keys: Tensor, seed_low: int, seed_high: int, draw: int,
    tokens: Tensor | None, tau: float, tau_at: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    n, k = ids.shape
    values, ids, keys = values.contiguous(), ids.contiguous(), keys.contiguous()
    lse, tokens = lse.contiguous(), None if tokens is None else tokens.contiguous()
    weights, mass = torch.empty_like(values), torch.empty_like(lse)
    chosen = torch.empty(n, dtype=torch.int64, device=ids.device)
    launch(
        sample_kernel, (n,), values, ids, lse, keys, tokens, k, seed_low, seed_high, draw, tau, tau_at, weights, chosen,
        mass,
        num_warps=4, KEPT=next_power_of_2(max(k, 16)),
    )  # fmt: skip
    return weights, chosen, mass


@_sample_support.register_fake
def _(values: Tensor, ids: Tensor, lse: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return values.new_empty(values.shape), ids.new_empty(lse.shape), lse.new_empty(lse.shape)


def select(
    logits: Rows, k: int, suppress: Tensor | None, indices: Tensor | None, tokens: Tensor | None, dtype: torch.dtype
) -> Support:
    """See `torch_ops.sample.select`."""
    return Support(*_select(as_tensor(logits), k, suppress, indices, tokens))


def sample(support: Support, keys: Tensor, seed: int, draw: int, tokens: Tensor | None, tau: float | Tensor) -> Sample:
    """See `torch_ops.sample.sample`."""
    ids, values, lse = support
    return Sample(*_sample_support(values, ids, lse, keys, *words(seed), words(draw)[0], tokens, *split_tau(tau)))


def select_and_sample(
    logits: Rows, k: int, tau: float | Tensor, keys: Tensor, seed: int, draw: int, suppress: Tensor | None,
    indices: Tensor | None, tokens: Tensor | None, dtype: torch.dtype,
) -> tuple[Tensor, Sample]:  # fmt: skip
    """See `torch_ops.sample.select_and_sample`."""
    ids, *sample = _select_and_sample(
        as_tensor(logits), k, *split_tau(tau), keys, *words(seed), words(draw)[0], suppress, indices, tokens
    )
    return ids, Sample(*sample)

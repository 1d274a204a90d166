"""Exact top-k of a row without sorting the vocabulary: the device functions of `sample`, with those of `bisection`.

1. `survey` streams the row once.  Its entries fall into groups, one per lane and tile; it leaves the maximum
   of every group, and the row's log-sum-exp.
2. `bisection.threshold`: the k-th largest of the group maxima is a lower bound T of the k-th largest entry, for k
   entries reach it.
3. `candidates`: an entry >= T lies in a group whose maximum is >= T, and of those there are k, or a few more
   on ties.  Only they are read again (256 groups of 64 are a tenth of a row of 151,936); their entries >= T
   go into a buffer.  In rows whose order is random, -G ln(1 - k/G) entries pass, G being the number of
   groups: 271 for k = 256 and G = 2,560.
4. `bisection.narrow`: where more pass than the sort takes (ties, large entries side by side, masked rows), the exact
   k-th key is found by bisection, in the buffer or, if they do not fit there either, over the row.
5. The rest is sorted.

The order is by value, then lower id.  Both make one 64-bit key: the bits of the float32, made monotonic, above
the complement of the id.  Suppressed ids come after everything, by id.
"""

from __future__ import annotations

import triton
import triton.language as tl

from grade_kernels.triton_ops import device
from grade_kernels.triton_ops.device import finite_or_zero, lane_max, lane_offsets, lane_sum
from grade_kernels.triton_ops.online import LOG2E
from grade_kernels.triton_ops.suppress import is_blocked

LOWEST = tl.constexpr(-(2**63))  # below every key
BLOCKED = tl.constexpr(-(2**31))  # the value of a suppressed id, below
MASKED = tl.constexpr(-2139095041)  # that of -inf


@triton.jit
def order(x):
    """int32 in the order of the float32: the zeros are equal, NaN is the largest."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(x != x, 0x7FC00000, bits ^ ((bits >> 31) & 0x7FFFFFFF))


@triton.jit
def from_order(value):
    """The float32 whose `order` is `value`; `BLOCKED` is -inf."""
    bits = value ^ ((value >> 31) & 0x7FFFFFFF)
    return tl.where(value <= MASKED, float("-inf"), bits.to(tl.float32, bitcast=True))


@triton.jit
def key(value, ids):
    """int64 keys of values in `order` at ids (both int32)."""
    return (value.to(tl.int64) << 32) | (0xFFFFFFFF - ids.to(tl.int64))


@triton.jit
def key_id(key):
    """The id (int64) in a key."""
    return 0xFFFFFFFF - (key & 0xFFFFFFFF)


@triton.jit
def survey(
    row, vocab, first, last, bits, out_maxima,
    MAXIMA: tl.constexpr, TILES: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """(group maxima, peak, norm) over tiles first..last of a row: log-sum-exp = peak + log(norm).

    With MAXIMA the maxima are int32 [TILES, LANES] in `order`, without suppressed ids, and `BLOCKED` for groups
    outside the tiles; or they are stored, where there is an `out_maxima` [tiles, LANES].
    """
    TILE: tl.constexpr = LANES * WIDTH * STEPS
    lanes = tl.arange(0, LANES)
    kept = tl.full([TILES, LANES], BLOCKED, tl.int32)
    peak = tl.full([LANES], float("-inf"), tl.float32)
    norm = tl.zeros([LANES], tl.float32)
    full = vocab // TILE
    for tile in range(first, tl.minimum(last, full)):
        largest, peak, norm = _survey_tile(row, vocab, tile * TILE, bits, peak, norm, False, LANES, WIDTH, STEPS)
        if MAXIMA:
            if out_maxima is None:
                kept = _keep(kept, tile, order(largest), TILES)
            else:
                tl.store(out_maxima + tile * LANES + lanes, order(largest))
    if (last > full) & (vocab > full * TILE):
        largest, peak, norm = _survey_tile(row, vocab, full * TILE, bits, peak, norm, True, LANES, WIDTH, STEPS)
        if MAXIMA:
            maxima = tl.where(full * TILE + lanes * WIDTH < vocab, order(largest), BLOCKED)
            if out_maxima is None:
                kept = _keep(kept, full, maxima, TILES)
            else:
                tl.store(out_maxima + full * LANES + lanes, maxima)
    peak, norm = merge_sums(peak, norm)
    return kept, peak, norm


@triton.jit
def _keep(kept, tile, maxima, TILES: tl.constexpr):
    # Registers cannot be addressed, so each of a lane's TILES is asked; that is one select for every 4 entries.
    return tl.where(tl.arange(0, TILES)[:, None] == tile, maxima[None, :], kept)


@triton.jit
def read_maxima(maxima, groups, TILES: tl.constexpr, LANES: tl.constexpr):
    """What `survey` stored at `maxima`, as it would have returned it."""
    lanes = tl.arange(0, LANES)
    kept = tl.full([TILES, LANES], BLOCKED, tl.int32)
    # A tile at a time: the compiler would spread a block of them over the warps, which then exchange it in every count.
    for tile in tl.static_range(TILES):
        number = tile * LANES + lanes
        kept = _keep(kept, tile, tl.load(maxima + number, mask=number < groups, other=BLOCKED), TILES)
    return kept


@triton.jit
def _survey_tile(
    row, vocab, start, bits, peak, norm,
    MASKED: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """A tile in parts of 16 entries a lane, which is what fits in registers next to their exponentials."""
    PART: tl.constexpr = min(STEPS, max(1, 16 // WIDTH))
    largest = tl.full([LANES], float("-inf"), tl.float32)
    for part in tl.static_range(STEPS // PART):
        begin = start + part * PART * LANES * WIDTH
        ids = begin + lane_offsets(LANES, WIDTH, PART)
        if MASKED:
            x = device.load_tail(row, begin + device.tile_offsets(LANES, WIDTH, PART), vocab, LANES, WIDTH, PART)
        else:
            x = device.load_tile(row + begin, LANES, WIDTH, PART)
        top = lane_max(x)
        raised = tl.maximum(peak, top)
        base = finite_or_zero(raised)
        norm = norm * tl.exp2((peak - base) * LOG2E) + lane_sum(tl.exp2((x - base[None, :, None]) * LOG2E))
        peak = raised
        if bits is not None:
            # One word for the WIDTH ids of a load, along one axis as they are: see `device.tile_offsets`.
            firsts = begin + tl.arange(0, PART * LANES) * WIDTH
            word = tl.reshape(tl.load(bits + (firsts >> 4), mask=firsts < vocab, other=0), (PART, LANES, 1))
            x = tl.where(((word >> (ids & 15)) & 1) != 0, float("-inf"), x)
            top = lane_max(x)
        largest = tl.maximum(largest, top)
    return largest, peak, norm


@triton.jit
def suppressed(bits, ids, vocab, WIDTH: tl.constexpr):
    """Whether ids [..., WIDTH], the first of them a multiple of WIDTH, are suppressed, by one load for all WIDTH, which
    share a word."""
    first = tl.min(ids & -WIDTH, axis=len(ids.shape) - 1, keep_dims=True)
    word = tl.load(bits + (first >> 4), mask=first < vocab, other=0)
    return ((word >> (ids & 15)) & 1) != 0


@triton.jit
def merge_sums(peaks, norms):
    """(peak, norm) of the union of parts, each sum_i e^(x_i) = norm e^peak."""
    # The peak of a part without mass is none: 0 in its place may be far above the row's.
    peaks = tl.where(norms == 0.0, float("-inf"), peaks)
    peak = finite_or_zero(tl.max(peaks, axis=0))
    return peak, tl.sum(norms * tl.exp2((peaks - peak) * LOG2E), axis=0)


@triton.jit
def mark(take):
    """Bool [CHUNKS, WIDTH], WIDTH at most 16, as the bits of int32 [CHUNKS], below their number in the upper half.

    A chunk lies in a thread, so that what is exchanged and stored has one entry a chunk, in the layout it has already.
    """
    bit = 1 << tl.arange(0, take.shape[1])[None, :]
    return tl.sum(tl.where(take, bit + (1 << 16), 0), axis=1)


@triton.jit
def append(ids, taken, buffer, filled, LIMIT: tl.constexpr, WIDTH: tl.constexpr):
    """Store the ids to be taken, of WIDTH from each of `ids` on (int32 [CHUNKS]), behind the first `filled` entries of
    the buffer (int32), as far as LIMIT; the new number of entries, which may be beyond it.

    `taken` (int32 [CHUNKS]) is what `mark` gives.
    """
    number = taken >> 16
    place = filled + tl.cumsum(number, axis=0) - number
    for i in tl.static_range(WIDTH):
        this = (taken >> i) & 1
        tl.store(buffer + place, ids + i, mask=(this != 0) & (place < LIMIT))
        place += this
    return filled + tl.sum(number, axis=0)


@triton.jit
def candidates(
    row, vocab, bits, T, reached, maxima, hits, capacity, buffer,
    TILES: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr, STEPS: tl.constexpr, READ: tl.constexpr,
    LIMIT: tl.constexpr,
):  # fmt: skip
    """Put the ids of the entries that reach T into the buffer; how many there are, stored (up to LIMIT) or not.

    `hits` is room for the numbers of `capacity` groups; where more have `reached` T, LIMIT + 1 ids are claimed and none
    is read, and so where T is below everything and there may be more.  READ groups are read at a time.
    """
    TILE: tl.constexpr = LANES * WIDTH * STEPS
    hit = (maxima >= T).to(tl.int32)
    per_lane = tl.sum(hit, axis=0)
    place = (tl.cumsum(per_lane, axis=0) - per_lane)[None, :] + tl.cumsum(hit, axis=0) - hit
    number = tl.arange(0, TILES)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    count = tl.where(T == BLOCKED, TILES * LANES, reached)  # groups outside the row are `BLOCKED`
    tl.store(hits + place, number, mask=(hit != 0) & (place < capacity))
    tl.debug_barrier()
    chunk = tl.arange(0, READ * STEPS)[:, None]
    least = from_order(T)
    filled = tl.full([], 0, tl.int32)
    for start in range(0, tl.where(count <= capacity, count, 0), READ):
        at = start + chunk // STEPS
        group = tl.load(hits + at, mask=at < count, other=0)
        first = group // LANES * TILE + group % LANES * WIDTH + chunk % STEPS * (LANES * WIDTH)
        ids = first + tl.arange(0, WIDTH)[None, :]
        inside = (ids < vocab) & (at < count)
        x = tl.load(row + ids, mask=inside, other=0.0).to(tl.float32)
        take = inside & ~(x < least)
        if bits is not None:
            take &= (T == BLOCKED) | ~suppressed(bits, ids, vocab, WIDTH)
        filled = append(tl.sum(first, axis=1), mark(take), buffer, filled, LIMIT, WIDTH)
    return tl.where(count <= capacity, filled, LIMIT + 1)


@triton.jit
def keys_of(row, ids, inside, bits):
    """int64 keys [N] of the entries of a row at ids (int32 [N]), `LOWEST` where not `inside`."""
    x = tl.load(row + ids, mask=inside, other=0.0).to(tl.float32)
    value = order(x)
    if bits is not None:
        value = tl.where(is_blocked(bits, tl.where(inside, ids, 0)), BLOCKED, value)
    return tl.where(inside, key(value, ids), LOWEST)

"""Exact top-k of a row without sorting the vocabulary: the device functions of `sample`.

1. `survey` streams the row once.  Its entries fall into groups, one per lane and tile; it leaves the maximum
   of every group, and the row's log-sum-exp.
2. `threshold`: the k-th largest of the group maxima is a lower bound T of the k-th largest entry, for k
   entries reach it.
3. `candidates`: an entry >= T lies in a group whose maximum is >= T, and of those there are k, or a few more
   on ties.  Only they are read again (256 groups of 64 are a tenth of a row of 151,936); their entries >= T
   go into a buffer.  In rows whose order is random, -G ln(1 - k/G) entries pass, G being the number of
   groups: 271 for k = 256 and G = 2,560.
4. `narrow`: where more pass than the sort takes (ties, large entries side by side, masked rows), the exact
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

LOWEST = tl.constexpr(-(2**63))  # below every key
BLOCKED = tl.constexpr(-(2**31))  # the value of a suppressed id, below
MASKED = tl.constexpr(-2139095041)  # that of -inf


@triton.jit
def order(x):
    """int32 in the order of the float32: the zeros are equal, NaN is the largest."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(x != x, 0x7FC00000, bits ^ ((bits >> 31) & 0x7FFFFFFF))


@triton.jit
def sort_keys(x, ids, inside, bits, vocab, WIDTH: tl.constexpr):
    """int64 keys of the entries x at ids (int32) [STEPS, LANES, WIDTH], `LOWEST` where not `inside`; `bits` marks
    suppressed ids."""
    value = order(x)
    if bits is not None:
        value = tl.where(_blocked(bits, ids, vocab, WIDTH), BLOCKED, value)
    key = (value.to(tl.int64) << 32) | (0xFFFFFFFF - ids.to(tl.int64))
    return tl.where(inside, key, LOWEST)


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
        norm = norm * tl.exp(peak - base) + lane_sum(tl.exp(x - base[None, :, None]))
        peak = raised
        if bits is not None:
            x = tl.where(_blocked(bits, ids, vocab, WIDTH), float("-inf"), x)
            top = lane_max(x)
        largest = tl.maximum(largest, top)
    return largest, peak, norm


@triton.jit
def _blocked(bits, ids, vocab, WIDTH: tl.constexpr):
    """Whether ids [STEPS, LANES, WIDTH] are suppressed, by one load a lane: WIDTH adjacent ids share a word."""
    first = tl.min(ids, axis=2, keep_dims=True)
    word = tl.load(bits + (first >> 4), mask=first < vocab, other=0)
    return ((word >> (ids & 15)) & 1) != 0


@triton.jit
def merge_sums(peaks, norms):
    """(peak, norm) of the union of parts, each sum_i e^(x_i) = norm e^peak."""
    peak = finite_or_zero(tl.max(peaks, axis=0))
    return peak, tl.sum(norms * tl.exp(peaks - peak), axis=0)


@triton.jit
def threshold(maxima, groups, k):
    """T (int32): a lower bound of the k-th largest of the maxima [TILES, LANES], which k to 9k/8 of them reach, or
    more if they are equal.  Fewer groups than k: T is below everything."""
    # Invariant: at least k of them reach `low`, fewer reach `high`.
    low = tl.full([], BLOCKED, tl.int64)
    high = tl.max(tl.max(maxima, axis=0), axis=0).to(tl.int64) + 1
    reached = tl.full([], 2147483647, tl.int32)
    while (high - low > 1) & (reached > k + k // 8) & (groups >= k):
        middle = (low + high) >> 1
        count = tl.sum(tl.sum((maxima >= middle.to(tl.int32)).to(tl.int32), axis=0), axis=0)
        enough = count >= k
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
        reached = tl.where(enough, count, reached)
    return low.to(tl.int32)


@triton.jit
def append(keys, take, buffer, filled, LIMIT: tl.constexpr):
    """Store the keys [STEPS, LANES, WIDTH] to be taken behind the first `filled` entries of the buffer, as far
    as LIMIT; the new number of entries, which may be beyond it."""
    take = take.to(tl.int32)
    per_step = tl.sum(take, axis=2)
    per_lane = tl.sum(per_step, axis=0)
    before = (tl.cumsum(per_lane, axis=0) - per_lane)[None, :] + tl.cumsum(per_step, axis=0) - per_step
    place = filled + before[:, :, None] + tl.cumsum(take, axis=2) - take
    tl.store(buffer + place, keys, mask=(take != 0) & (place < LIMIT))
    return filled + tl.sum(per_lane, axis=0)


@triton.jit
def candidates(
    row, vocab, bits, T, floor, maxima, hits, capacity, buffer,
    TILES: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr, STEPS: tl.constexpr, READ: tl.constexpr,
    LIMIT: tl.constexpr,
):  # fmt: skip
    """Put the keys >= floor, which is that of T, into the buffer; how many there are, stored (up to LIMIT) or not.

    `hits` is room for the numbers of `capacity` groups that reach T; with more of them, LIMIT + 1 keys are claimed
    and none is read.  READ groups are read at a time.
    """
    TILE: tl.constexpr = LANES * WIDTH * STEPS
    hit = (maxima >= T).to(tl.int32)
    per_lane = tl.sum(hit, axis=0)
    place = (tl.cumsum(per_lane, axis=0) - per_lane)[None, :] + tl.cumsum(hit, axis=0) - hit
    number = tl.arange(0, TILES)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    count = tl.sum(per_lane, axis=0)
    tl.store(hits + place, number, mask=(hit != 0) & (place < capacity))
    tl.debug_barrier()
    lanes = tl.arange(0, READ)
    step = tl.arange(0, STEPS)[:, None, None] * (LANES * WIDTH)
    within = step + tl.arange(0, WIDTH)[None, None, :]
    filled = tl.full([], 0, tl.int32)
    for start in range(0, tl.where(count <= capacity, count, 0), READ):
        group = tl.load(hits + start + lanes, mask=start + lanes < count, other=0)
        ids = (group // LANES * TILE + group % LANES * WIDTH)[None, :, None] + within
        inside = (ids < vocab) & (start + lanes < count)[None, :, None]
        x = tl.load(row + ids, mask=inside, other=0.0).to(tl.float32)
        keys = sort_keys(x, ids, inside, bits, vocab, WIDTH)
        filled = append(keys, keys >= floor, buffer, filled, LIMIT)
    return tl.where(count <= capacity, filled, LIMIT + 1)


@triton.jit
def narrow(row, vocab, k, bits, low, filled, buffer, LANES: tl.constexpr, WIDTH: tl.constexpr, LIMIT: tl.constexpr):
    """Leave exactly the k largest keys at the front of the buffer.

    Of the keys >= `low`, `filled` >= k in number, the buffer holds all or, where they are more than LIMIT, some;
    then the row is streamed again for every step of the bisection (at most 64).
    """
    entries = tl.arange(0, LIMIT)
    fits = filled <= LIMIT
    kept = tl.load(buffer + entries, mask=entries < tl.where(fits, filled, 0), other=LOWEST)
    high = tl.full([], 0x7FC00001, tl.int64) << 32  # above every key
    reached = filled
    # Mostly it is ties at the value of `low` that are too many (a masked row), so the next value is tried first.
    # Keys are distinct, so some threshold has exactly k at or above it.
    middle = low + (tl.full([], 1, tl.int64) << 32)
    while (reached != k) & (low + 1 < high):
        if fits:
            count = tl.sum((kept >= middle).to(tl.int32), axis=0)
        else:
            count = _count_in_row(row, vocab, bits, middle, LANES, WIDTH)
        enough = count >= k
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
        reached = tl.where(enough, count, reached)
        middle = (low & high) + ((low ^ high) >> 1)
    tl.debug_barrier()  # everyone has read the buffer
    if fits:
        take = kept >= low
        place = tl.cumsum(take.to(tl.int32), axis=0) - 1
        tl.store(buffer + place, kept, mask=take)
    else:
        _collect_from_row(row, vocab, bits, low, buffer, LANES, WIDTH, LIMIT)
    tl.debug_barrier()


@triton.jit
def _row_keys(row, vocab, tile, bits, LANES: tl.constexpr, WIDTH: tl.constexpr):
    ids = tile * (LANES * WIDTH) + lane_offsets(LANES, WIDTH, 1)
    inside = ids < vocab
    x = tl.load(row + ids, mask=inside, other=0.0).to(tl.float32)
    return sort_keys(x, ids, inside, bits, vocab, WIDTH)


@triton.jit
def _count_in_row(row, vocab, bits, low, LANES: tl.constexpr, WIDTH: tl.constexpr):
    count = tl.zeros([LANES], tl.int32)
    for tile in range(0, tl.cdiv(vocab, LANES * WIDTH)):
        count += lane_sum((_row_keys(row, vocab, tile, bits, LANES, WIDTH) >= low).to(tl.int32))
    return tl.sum(count, axis=0)


@triton.jit
def _collect_from_row(
    row, vocab, bits, low, buffer, LANES: tl.constexpr, WIDTH: tl.constexpr, LIMIT: tl.constexpr
):  # fmt: skip
    filled = tl.full([], 0, tl.int32)
    for tile in range(0, tl.cdiv(vocab, LANES * WIDTH)):
        keys = _row_keys(row, vocab, tile, bits, LANES, WIDTH)
        filled = append(keys, keys >= low, buffer, filled, LIMIT)

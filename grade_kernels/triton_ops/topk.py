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

from grade_kernels.triton_ops.device import finite_or_zero, lane_max, lane_offsets, lane_sum
from grade_kernels.triton_ops.suppress import is_blocked

# Below every key: -inf is -2139095041, a suppressed id -2^31.
LOWEST = tl.constexpr(-(2**63))
BLOCKED = tl.constexpr(-(2**31))


@triton.jit
def order(x):
    """int32 in the order of the float32: the zeros are equal, NaN is the largest."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(x != x, 0x7FC00000, bits ^ ((bits >> 31) & 0x7FFFFFFF))


@triton.jit
def sort_keys(x, ids, inside, bits):
    """int64 keys of the entries x at ids (int32), `LOWEST` where not `inside`; `bits` marks suppressed ids."""
    value = order(x)
    if bits is not None:
        value = tl.where(is_blocked(bits, tl.where(inside, ids, 0)), BLOCKED, value)
    key = (value.to(tl.int64) << 32) | (0xFFFFFFFF - ids.to(tl.int64))
    return tl.where(inside, key, LOWEST)


@triton.jit
def key_id(key):
    """The id (int64) in a key."""
    return 0xFFFFFFFF - (key & 0xFFFFFFFF)


@triton.jit
def survey(
    row, vocab, first, last, bits, maxima,
    MAXIMA: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """(peak, norm) over tiles first..last of a row: log-sum-exp = peak + log(norm).  Group maxima, as `order`
    has them and without suppressed ids, go to maxima[tile * LANES + lane]."""
    TILE: tl.constexpr = LANES * WIDTH * STEPS
    offsets = lane_offsets(LANES, WIDTH, STEPS)
    lanes = tl.arange(0, LANES)
    peak = tl.full([LANES], float("-inf"), tl.float32)
    norm = tl.zeros([LANES], tl.float32)
    full = vocab // TILE
    for tile in range(first, tl.minimum(last, full)):
        ids = tile * TILE + offsets
        x = tl.load(row + ids).to(tl.float32)
        peak, norm = _online(x, peak, norm)
        if MAXIMA:
            if bits is not None:
                x = tl.where(is_blocked(bits, ids), float("-inf"), x)
            tl.store(maxima + tile * LANES + lanes, order(lane_max(x)))
    if (last > full) & (vocab > full * TILE):
        ids = full * TILE + offsets
        inside = ids < vocab
        x = tl.load(row + ids, mask=inside, other=float("-inf")).to(tl.float32)
        peak, norm = _online(x, peak, norm)
        if MAXIMA:
            if bits is not None:
                x = tl.where(is_blocked(bits, tl.where(inside, ids, 0)), float("-inf"), x)
            tl.store(maxima + full * LANES + lanes, order(lane_max(x)), mask=full * TILE + lanes * WIDTH < vocab)
    return merge_sums(peak, norm)


@triton.jit
def _online(x, peak, norm):
    raised = tl.maximum(peak, lane_max(x))
    base = finite_or_zero(raised)
    return raised, norm * tl.exp(peak - base) + lane_sum(tl.exp(x - base[None, :, None]))


@triton.jit
def merge_sums(peaks, norms):
    """(peak, norm) of the union of parts, each sum_i e^(x_i) = norm e^peak."""
    peak = finite_or_zero(tl.max(peaks, axis=0))
    return peak, tl.sum(norms * tl.exp(peaks - peak), axis=0)


@triton.jit
def threshold(maxima, groups, k, GROUPS: tl.constexpr):
    """(T, group maxima [GROUPS]): T is a lower bound of the k-th largest maximum, which k to 9k/8 of them reach,
    or more if they are equal.  Fewer groups than k: T is below everything."""
    lanes = tl.arange(0, GROUPS)
    values = tl.load(maxima + lanes, mask=lanes < groups, other=BLOCKED)
    # Invariant: at least k of them reach `low`, fewer reach `high`.
    low = tl.full([], BLOCKED, tl.int64)
    high = tl.max(values, axis=0).to(tl.int64) + 1
    reached = tl.full([], 2147483647, tl.int32)
    while (high - low > 1) & (reached > k + k // 8) & (groups >= k):
        middle = (low + high) >> 1
        count = tl.sum((values >= middle).to(tl.int32), axis=0)
        enough = count >= k
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
        reached = tl.where(enough, count, reached)
    return low.to(tl.int32), values


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
    row, vocab, bits, T, floor, maxima, hits, buffer,
    GROUPS: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr, STEPS: tl.constexpr, READ: tl.constexpr,
    LIMIT: tl.constexpr,
):  # fmt: skip
    """Put the keys >= floor, which is that of T, into the buffer; how many there are, stored (up to LIMIT) or not.

    `maxima` [GROUPS] are in registers, `hits` [GROUPS] is scratch for the groups that reach T, READ groups are
    read at a time.
    """
    TILE: tl.constexpr = LANES * WIDTH * STEPS
    hit = maxima >= T
    place = tl.cumsum(hit.to(tl.int32), axis=0) - 1
    tl.store(hits + place, tl.arange(0, GROUPS), mask=hit)
    count = tl.sum(hit.to(tl.int32), axis=0)
    tl.debug_barrier()
    lanes = tl.arange(0, READ)
    step = tl.arange(0, STEPS)[:, None, None] * (LANES * WIDTH)
    within = step + tl.arange(0, WIDTH)[None, None, :]
    filled = tl.full([], 0, tl.int32)
    for start in range(0, count, READ):
        group = tl.load(hits + start + lanes, mask=start + lanes < count, other=0)
        ids = (group // LANES * TILE + group % LANES * WIDTH)[None, :, None] + within
        inside = (ids < vocab) & (start + lanes < count)[None, :, None]
        x = tl.load(row + ids, mask=inside, other=0.0).to(tl.float32)
        keys = sort_keys(x, ids, inside, bits)
        filled = append(keys, keys >= floor, buffer, filled, LIMIT)
    return filled


@triton.jit
def narrow(
    row, vocab, k, bits, low, filled, buffer,
    LANES: tl.constexpr, WIDTH: tl.constexpr, STEPS: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """Leave exactly the k largest keys at the front of the buffer.

    Of the keys >= `low`, `filled` >= k in number, the buffer holds all or, where they are more than LIMIT, some;
    then the row is streamed again for every step of the bisection (at most 64).
    """
    entries = tl.arange(0, LIMIT)
    fits = filled <= LIMIT
    kept = tl.load(buffer + entries, mask=entries < tl.where(fits, filled, 0), other=LOWEST)
    high = tl.full([], 0x7FC00001, tl.int64) << 32  # above every key
    reached = filled
    # Keys are distinct, so some threshold has exactly k at or above it.
    while (reached != k) & (low + 1 < high):
        middle = (low & high) + ((low ^ high) >> 1)
        if fits:
            count = tl.sum((kept >= middle).to(tl.int32), axis=0)
        else:
            count = _count_in_row(row, vocab, bits, middle, LANES, WIDTH, STEPS)
        enough = count >= k
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
        reached = tl.where(enough, count, reached)
    tl.debug_barrier()  # everyone has read the buffer
    if fits:
        take = kept >= low
        place = tl.cumsum(take.to(tl.int32), axis=0) - 1
        tl.store(buffer + place, kept, mask=take)
    else:
        _collect_from_row(row, vocab, bits, low, buffer, LANES, WIDTH, STEPS, LIMIT)
    tl.debug_barrier()


@triton.jit
def _row_keys(row, vocab, tile, bits, LANES: tl.constexpr, WIDTH: tl.constexpr, STEPS: tl.constexpr):
    ids = tile * (LANES * WIDTH * STEPS) + lane_offsets(LANES, WIDTH, STEPS)
    inside = ids < vocab
    x = tl.load(row + ids, mask=inside, other=0.0).to(tl.float32)
    return sort_keys(x, ids, inside, bits)


@triton.jit
def _count_in_row(row, vocab, bits, low, LANES: tl.constexpr, WIDTH: tl.constexpr, STEPS: tl.constexpr):
    count = tl.zeros([LANES], tl.int32)
    for tile in range(0, tl.cdiv(vocab, LANES * WIDTH * STEPS)):
        count += lane_sum((_row_keys(row, vocab, tile, bits, LANES, WIDTH, STEPS) >= low).to(tl.int32))
    return tl.sum(count, axis=0)


@triton.jit
def _collect_from_row(
    row, vocab, bits, low, buffer, LANES: tl.constexpr, WIDTH: tl.constexpr, STEPS: tl.constexpr, LIMIT: tl.constexpr
):  # fmt: skip
    filled = tl.full([], 0, tl.int32)
    for tile in range(0, tl.cdiv(vocab, LANES * WIDTH * STEPS)):
        keys = _row_keys(row, vocab, tile, bits, LANES, WIDTH, STEPS)
        filled = append(keys, keys >= low, buffer, filled, LIMIT)

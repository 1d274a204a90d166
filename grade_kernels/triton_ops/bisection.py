"""The k-th largest of group maxima and of keys by bisection: the second and fourth step of `topk`.

A step counts how many values reach three thresholds, by one exchange between the warps, and leaves a quarter of the
interval: waiting for each other costs the warps more than counting.  Of 2,560 maxima of normal rows, to find the 256 to
288 largest mostly takes four steps.
"""

from __future__ import annotations

import triton
import triton.language as tl

from grade_kernels.triton_ops import topk


@triton.jit
def threshold(maxima, groups, peak, k):
    """(T, reached), int32: a lower bound of the k-th largest of the maxima [TILES, LANES], and how many reach it, which
    is k to 9k/8 of them, or more if they are equal.  Fewer groups than k: T is below everything."""
    # Every group reaches the least of their maxima, and none exceeds the row's.
    low = tl.min(tl.min(tl.where(maxima == topk.BLOCKED, 0x7FFFFFFF, maxima), axis=0), axis=0)
    high, reached = topk.order(peak) + 1, groups
    while (low + 1 < high) & (reached > k + k // 8) & (groups >= k):
        first, second, third = _quarters(low, high)
        one = tl.sum((maxima >= first).to(tl.int32), axis=0)
        two = tl.sum((maxima >= second).to(tl.int32), axis=0)
        three = tl.sum((maxima >= third).to(tl.int32), axis=0)
        one, two, three = _totals(one, two, three)
        low, high, reached = _between(low, high, first, second, third, one, two, three, k, reached)
    return tl.where(groups >= k, low, topk.BLOCKED), reached


@triton.jit
def _quarters(low, high):
    """Three rising thresholds between low and high; the last ones reach beyond it where too few lie between."""
    step = tl.maximum((high >> 2) - (low >> 2), 1)  # of the difference itself, 64 bits may be too few
    return low + step, low + 2 * step, low + 3 * step


@triton.jit
def _between(low, high, first, second, third, one, two, three, k, reached):
    """(low, high, reached) of the next step of a bisection by three rising thresholds at a time, of which `one`,
    `two` and `three` values reach the first, second and third.

    At least k values, `reached` in number, reach `low`; fewer reach `high`.
    """
    high = tl.where(three >= k, high, tl.minimum(high, third))
    high = tl.where(two >= k, high, tl.minimum(high, second))
    high = tl.where(one >= k, high, tl.minimum(high, first))
    low = tl.where(three >= k, third, tl.where(two >= k, second, tl.where(one >= k, first, low)))
    reached = tl.where(three >= k, three, tl.where(two >= k, two, tl.where(one >= k, one, reached)))
    return low, high, reached


@triton.jit
def _totals(one, two, three):
    """The sums of three int32 [LANES], each below 2^15, by one exchange between threads."""
    total = tl.sum((three.to(tl.int64) << 32) + (one + (two << 16)).to(tl.int64), axis=0)
    return (total & 0xFFFF).to(tl.int32), ((total >> 16) & 0xFFFF).to(tl.int32), (total >> 32).to(tl.int32)


@triton.jit
def narrow(row, vocab, k, bits, T, filled, buffer, LANES: tl.constexpr, WIDTH: tl.constexpr, LIMIT: tl.constexpr):
    """Leave exactly the ids of the k largest keys at the front of the buffer.

    Of the ids whose entries reach T, `filled` >= k in number, the buffer holds all or, where they are more than LIMIT,
    some; then the row is streamed again for every step of the bisection.
    """
    entries = tl.arange(0, LIMIT)
    fits = filled <= LIMIT
    stored = entries < tl.where(fits, filled, 0)
    ids = tl.load(buffer + entries, mask=stored, other=0)
    kept = topk.keys_of(row, ids, stored, bits)
    above = (T.to(tl.int64) << 32) + 0x100000000
    low = above - vocab  # the lowest key of the value T, that of the last id
    high = tl.full([], 0x7FC00001, tl.int64) << 32  # above every key
    reached = filled
    # Mostly it is ties at the value T that are too many (a masked row), so the next value is tried first.
    # Keys are distinct, so some threshold has exactly k at or above it.
    first, second, third = low + (vocab >> 2), low + (vocab >> 1), above
    while (reached != k) & (low + 1 < high):
        if fits:
            one, two, three = _totals(
                (kept >= first).to(tl.int32), (kept >= second).to(tl.int32), (kept >= third).to(tl.int32)
            )
        else:
            one, two, three = _count_in_row(row, vocab, bits, first, second, third, LANES, WIDTH)
        low, high, reached = _between(low, high, first, second, third, one, two, three, k, reached)
        first, second, third = _quarters(low, high)
    tl.debug_barrier()  # everyone has read the buffer
    if fits:
        take = (kept >= low).to(tl.int32)
        place = tl.cumsum(take, axis=0) - 1
        tl.store(buffer + place, ids, mask=take != 0)
    else:
        _collect_from_row(row, vocab, bits, low, buffer, LANES, WIDTH, LIMIT)
    tl.debug_barrier()


@triton.jit
def _row_keys(row, vocab, first, bits, WIDTH: tl.constexpr):
    """int64 keys [LANES, WIDTH] of the entries from each of `first` (int32 [LANES]) on, `LOWEST` beyond the row."""
    ids = first[:, None] + tl.arange(0, WIDTH)[None, :]
    inside = ids < vocab
    value = topk.order(tl.load(row + ids, mask=inside, other=0.0).to(tl.float32))
    if bits is not None:
        value = tl.where(topk.suppressed(bits, ids, vocab, WIDTH), topk.BLOCKED, value)
    return tl.where(inside, topk.key(value, ids), topk.LOWEST)


@triton.jit
def _count_in_row(row, vocab, bits, first, second, third, LANES: tl.constexpr, WIDTH: tl.constexpr):
    """How many keys of the row reach each of three thresholds."""
    one = tl.zeros([LANES], tl.int32)
    two = tl.zeros([LANES], tl.int32)
    three = tl.zeros([LANES], tl.int32)
    for start in range(0, vocab, LANES * WIDTH):
        keys = _row_keys(row, vocab, start + tl.arange(0, LANES) * WIDTH, bits, WIDTH)
        one += tl.sum((keys >= first).to(tl.int32), axis=1)
        two += tl.sum((keys >= second).to(tl.int32), axis=1)
        three += tl.sum((keys >= third).to(tl.int32), axis=1)
    return tl.sum(one, axis=0), tl.sum(two, axis=0), tl.sum(three, axis=0)


@triton.jit
def _collect_from_row(
    row, vocab, bits, low, buffer, LANES: tl.constexpr, WIDTH: tl.constexpr, LIMIT: tl.constexpr
):  # fmt: skip
    filled = tl.full([], 0, tl.int32)
    for start in range(0, vocab, LANES * WIDTH):
        ids = start + tl.arange(0, LANES) * WIDTH
        filled = topk.append(
            ids, topk.mark(_row_keys(row, vocab, ids, bits, WIDTH) >= low), buffer, filled, LIMIT, WIDTH
        )

"""Device functions that several kernels share: addresses, accurate elementary functions, noise."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

from grade_kernels.common.environment import interpreting

INTERPRETED: tl.constexpr = tl.constexpr(interpreting())


@triton.jit
def row_start(row, inner, outer_stride, inner_stride):
    """Offset of a row (int64) in entries; see `launch.RowAddresses`."""
    return (row // inner) * outer_stride + (row % inner) * inner_stride


@triton.jit
def aligned(x, start, WIDTH: tl.constexpr):
    """x + start, of which the compiler is told what `launch.vector_width` found: WIDTH entries there are aligned.

    By itself it knows whether strides are divisible by 16; where they are not it would load single entries and spread
    a lane over WIDTH threads.
    """
    BYTES: tl.constexpr = WIDTH * x.dtype.element_ty.primitive_bitwidth // 8
    return tl.multiple_of(x + start, BYTES)


@triton.jit
def fma(x, y, z):
    """x y + z, rounded once.  NumPy has no such operation, so that the interpreter takes one more accurate."""
    if INTERPRETED:
        return (x.to(tl.float64) * y + z).to(tl.float32)
    return tl.fma(x, y, z)


@triton.jit
def divide(x, y):
    """x / y to some two units in the last place, for 2^-126 <= |y| <= 2^126: without the scaling that `/` does."""
    if INTERPRETED:
        return x / y
    return libdevice.fast_dividef(x, y)


@triton.jit
def log1p(x):
    """log(1 + x) for x > -1 to a few units in the last place (Kahan's correction of the rounded sum)."""
    y = 1.0 + x
    ratio = tl.log(y) / tl.where(y == 1.0, 1.0, y - 1.0)
    return tl.where(y == 1.0, x, x * ratio)


@triton.jit
def exp_tail(x):
    """(e^x - 1 - x) / (x^2 / 2) by its series, for |x| <= 1: relative error below 2^-24."""
    s = 2.0 / 39916800.0  # 2 / 11!
    s = s * x + 2.0 / 3628800.0
    s = s * x + 2.0 / 362880.0
    s = s * x + 2.0 / 40320.0
    s = s * x + 2.0 / 5040.0
    s = s * x + 2.0 / 720.0
    s = s * x + 2.0 / 120.0
    s = s * x + 2.0 / 24.0
    s = s * x + 2.0 / 6.0
    return s * x + 1.0


@triton.jit
def exp(x):
    """e^x for x <= 0 to a few units in the last place; 0 from -100 on; NaN stays NaN.

    tl.exp rounds x log2(e) first, which costs |x| units.  Here x = n ln 2 + r with ln 2 in two parts, so that only
    r <= 0.35 is rounded.
    """
    x = tl.maximum(x, -100.0, propagate_nan=tl.PropagateNan.ALL)
    n = tl.floor(x * 1.4426950408889634 + 0.5)
    r = (x - n * 0.693359375) + n * 2.1219444005469058e-4
    return tl.where(x <= -100.0, 0.0, tl.exp2(r * 1.4426950408889634) * tl.exp2(n))


@triton.jit
def expm1(x):
    """e^x - 1 to a few units in the last place, also at infinity."""
    near = tl.abs(x) <= 1.0
    s = tl.where(near, x, 0.0)
    return tl.where(near, s + 0.5 * s * s * exp_tail(s), tl.exp(x) - 1.0)


@triton.jit
def exponential(seed_low, seed_high, draw, row, ids):
    """Exp(1) noise, float32, of `row` (int64) at `ids`: `grade_kernels.common.random.exponential`, bit for bit in
    the 64 random bits."""
    seed = (seed_high.to(tl.uint32, bitcast=True).to(tl.uint64) << 32) | seed_low.to(tl.uint32, bitcast=True).to(
        tl.uint64
    )
    zero = (ids * 0).to(tl.uint32)
    row_low = zero + (row & 0xFFFFFFFF).to(tl.uint32)
    row_high = zero + ((row >> 32) & 0xFFFFFFFF).to(tl.uint32)
    high, low, _, _ = tl.philox(seed, row_low, row_high, ids.to(tl.uint32), zero + draw.to(tl.uint32, bitcast=True))
    # u = (high * 2^32 + low + 1/2) * 2^-64, clamped below 1, where float32 would round it to 1
    u = high.to(tl.float32) * 2.3283064365386963e-10 + (low.to(tl.float32) + 0.5) * 5.421010862427522e-20
    return -log1p(-tl.minimum(u, 0.999999940395355224609375))


@triton.jit
def tile_offsets(LANES: tl.constexpr, WIDTH: tl.constexpr, STEPS: tl.constexpr):
    """Offsets [STEPS * LANES * WIDTH] of a tile, ascending: the form in which tiles are loaded and stored.

    In one axis the compiler has a single way to share out adjacent entries: WIDTH to a thread, thread by thread, and
    again from the first thread.  With LANES = 32 * warps and WIDTH one vector load, `by_lane` then gives each lane
    to one thread.  Of a load with three axes Triton 3.6 gives neighbouring threads the steps of one lane, which every
    reduction over a lane then has to collect by exchanges.
    """
    return tl.max_contiguous(tl.arange(0, STEPS * LANES * WIDTH), WIDTH)


@triton.jit
def by_lane(x, LANES: tl.constexpr, WIDTH: tl.constexpr, STEPS: tl.constexpr):
    """A loaded tile, or what is known of its entries, as [STEPS, LANES, WIDTH]; no entry leaves its thread."""
    return tl.reshape(x, (STEPS, LANES, WIDTH))


@triton.jit
def load_tile(x, LANES: tl.constexpr, WIDTH: tl.constexpr, STEPS: tl.constexpr):
    """The tile [STEPS, LANES, WIDTH] that begins at x, `aligned`, and lies within its row: float32, by lane."""
    if (x.dtype.element_ty == tl.bfloat16) and (WIDTH > 1):
        # Two entries a word, each one instruction from its float32; apart, the upper one would take two.
        words = tl.multiple_of(x.to(tl.pointer_type(tl.int32)), 2 * WIDTH)
        words = tl.load(words + tile_offsets(LANES, WIDTH // 2, STEPS))
        low = (words << 16).to(tl.float32, bitcast=True)
        entries = tl.join(low, (words & -65536).to(tl.float32, bitcast=True))
    else:
        entries = tl.load(x + tile_offsets(LANES, WIDTH, STEPS)).to(tl.float32)
    return by_lane(entries, LANES, WIDTH, STEPS)


@triton.jit
def load_tail(x, ids, vocab, LANES: tl.constexpr, WIDTH: tl.constexpr, STEPS: tl.constexpr):
    """The same of a tile whose `ids` (`tile_offsets` of a row at x) may lie beyond the row: -inf there."""
    return by_lane(tl.load(x + ids, mask=ids < vocab, other=float("-inf")).to(tl.float32), LANES, WIDTH, STEPS)


@triton.jit
def lane_offsets(LANES: tl.constexpr, WIDTH: tl.constexpr, STEPS: tl.constexpr):
    """`tile_offsets` [STEPS, LANES, WIDTH]: thread `lane` reads WIDTH adjacent entries at STEPS places.

    For arithmetic with ids; a load at these offsets may spread a lane over threads, see `tile_offsets`.
    """
    step = tl.arange(0, STEPS)[:, None, None] * (LANES * WIDTH)
    return step + tl.arange(0, LANES)[None, :, None] * WIDTH + tl.arange(0, WIDTH)[None, None, :]


@triton.jit
def lane_sum(x):
    """[STEPS, LANES, WIDTH] -> [LANES]."""
    return tl.sum(tl.sum(x, axis=2), axis=0)


@triton.jit
def halves(x, LANES: tl.constexpr, WIDTH: tl.constexpr, STEPS: tl.constexpr):
    """A tile [STEPS, LANES, WIDTH] as two: of half the steps, or of half the width where there is one step.

    Entries that are adjacent stay together: on some devices two registers in a row share an instruction.
    """
    if STEPS > 1:
        return tl.split(tl.permute(tl.reshape(x, (2, STEPS // 2, LANES, WIDTH)), (1, 2, 3, 0)))
    else:
        return tl.split(tl.permute(tl.reshape(x, (1, LANES, 2, WIDTH // 2)), (0, 1, 3, 2)))


@triton.jit
def lane_dot(x, y, z, LANES: tl.constexpr, WIDTH: tl.constexpr, STEPS: tl.constexpr):
    """z + x y, summed over a lane but for its last two entries, by a chain of one multiply-add an entry.

    A reduction of x y adds products in pairs, so that half of them are multiplied first and added on their own.
    """
    if STEPS * WIDTH > 2:
        x0, x1 = halves(x, LANES, WIDTH, STEPS)
        y0, y1 = halves(y, LANES, WIDTH, STEPS)
        HALF_WIDTH: tl.constexpr = WIDTH if STEPS > 1 else WIDTH // 2
        HALF_STEPS: tl.constexpr = STEPS // 2 if STEPS > 1 else STEPS
        z = lane_dot(x0, y0, z, LANES, HALF_WIDTH, HALF_STEPS)
        return lane_dot(x1, y1, z, LANES, HALF_WIDTH, HALF_STEPS)
    else:
        return fma(x, y, z)


@triton.jit
def lane_max(x):
    return tl.max(tl.max(x, axis=2), axis=0)


@triton.jit
def finite_or_zero(peak):
    """A peak that may be subtracted: 0 in place of -inf, where a lane or a row has seen no mass."""
    return tl.where(peak == float("-inf"), 0.0, peak)

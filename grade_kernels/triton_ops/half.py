r"""The divergence of rows of 16-bit logits, in fewer instructions than `online` needs for float32.

State and moves are those of `online`: Z, A and the mean c of the differences, for every lane.  Logits of 11 bits or
less allow two savings.

One exponent for the whole row.  The weights are e^(p - m), with m the maximum of the first tile, and e^(q - o), with o
the logit of q there.  No maximum is taken per entry, nothing is scaled per tile, and either exponent is one fused
multiply-add of the logit.  Its rounding grows with |p - m|.

No exact means.  In `online` the largest entry of a lane has weight 1, so that where it is all of the lane its
difference is the mean, exactly, whatever the divergence.  Here the mean is rounded, by some 1e-7 of its distance from
the mean before.  KL has an error of that squared, and of that times the way that the mean of the lane still goes, since
a move takes sum w u for 0.  Of equal logits all terms are 0, as there.

A row whose mass lies too far above m or, under q, above o, or whose divergence is too small for its means, is read
again by `online.careful`, as are those that are not finite.
"""

from __future__ import annotations

import triton
import triton.language as tl

from grade_kernels.triton_ops import device, online

LOG2E: tl.constexpr = online.LOG2E
LN2: tl.constexpr = online.LN2
# Up to this log of the mass of either side, over e^m or e^o, the exponents of likely entries are right to 2^-20, and
# their weights to 7e-7.
ABOVE: tl.constexpr = tl.constexpr(16.0)
# Times the square of the largest step of a mean (its rounding is 2^-23 of that): below, KL may be off by 1e-6 by the
# square of that rounding alone.
LEAST: tl.constexpr = tl.constexpr(7e-9)


@triton.jit
def tile(
    p, q, valid, m2, o2, apart, apart_low, z, c, low, a, step,
    TAIL: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """One tile of both sides into (z, c, low, a, step); `valid` marks the entries that exist, in the TAIL.

    Weights are 2^(p LOG2E - m2) and 2^(q LOG2E - o2); o2 - m2 = apart + apart_low; `step` is the largest |mean|.
    """
    w = tl.exp2(device.fma(p, LOG2E, -m2))
    wq = tl.exp2(device.fma(q, LOG2E, -o2))
    d = (q - p) - c[None, :, None]
    if TAIL:  # -inf on both sides: of weight 0 already
        d = tl.where(valid, d, 0.0)
    after = z + device.lane_sum(w)
    moment = z * low + device.lane_sum(device.lane_dot(w, d, 0.0, LANES, WIDTH, STEPS))
    mean = device.divide(moment, tl.maximum(after, 1e-30))
    gain, lift = move(low - mean)
    centre = c + mean
    rest = mean - (centre - c)
    # e^u w = scale wq: from q, since from w and u it would lose its digits where p is tiny and q is not
    scale = tl.exp2(device.fma(-rest, LOG2E, device.fma(-centre, LOG2E, apart) + apart_low))
    u = d - mean[None, :, None]
    a = gain * a + (lift * z + device.lane_sum(terms(w, wq, u, scale[None, :, None], 0.0, LANES, WIDTH, STEPS)))
    return after, centre, rest, a, tl.maximum(step, tl.abs(mean))


@triton.jit
def terms(w, wq, u, scale, a, LANES: tl.constexpr, WIDTH: tl.constexpr, STEPS: tl.constexpr):
    """a + w phi(u), summed in the order of `device.lane_dot`.

    Where |u| is large that is scale wq - w (1 + u), in two multiply-adds to the sum.
    """
    if STEPS * WIDTH > 2:
        w0, w1 = device.halves(w, LANES, WIDTH, STEPS)
        q0, q1 = device.halves(wq, LANES, WIDTH, STEPS)
        u0, u1 = device.halves(u, LANES, WIDTH, STEPS)
        HALF_WIDTH: tl.constexpr = WIDTH if STEPS > 1 else WIDTH // 2
        HALF_STEPS: tl.constexpr = STEPS // 2 if STEPS > 1 else STEPS
        a = terms(w0, q0, u0, scale, a, LANES, HALF_WIDTH, HALF_STEPS)
        return terms(w1, q1, u1, scale, a, LANES, HALF_WIDTH, HALF_STEPS)
    else:
        near = tl.abs(u) <= online.NEAR
        a = device.fma(w, tl.where(near, u * u * online.phi_ratio(u), -1.0 - u), a)
        return tl.where(near, a, device.fma(wq, scale, a))


@triton.jit
def move(delta):
    """(e^delta, phi(delta)): see `online.move`."""
    gain = tl.exp2(delta * LOG2E)
    near = delta * delta * online.phi_ratio(delta)
    return gain, tl.where(tl.abs(delta) <= online.NEAR, near, (gain - 1.0) - delta)


@triton.jit
def kl_row(p, q, vocab, LANES: tl.constexpr, WIDTH: tl.constexpr, STEPS: tl.constexpr, TURNS: tl.constexpr):
    """(kl, peak_p, norm_p, peak_q, norm_q, shift) of the rows at p and q, as `KLStats` defines them.

    TURNS of the loop are written out after one another, which share its addresses and its count.
    """
    TILE: tl.constexpr = LANES * WIDTH * STEPS
    offsets = device.tile_offsets(LANES, WIDTH, STEPS)
    valid = device.by_lane(offsets < vocab, LANES, WIDTH, STEPS)
    x = device.load_tail(p, offsets, vocab, LANES, WIDTH, STEPS)
    y = device.load_tail(q, offsets, vocab, LANES, WIDTH, STEPS)
    top = tl.max(device.lane_max(x), axis=0)
    first = tl.max(device.lane_max(tl.where((x == top) & valid, y - x, float("-inf"))), axis=0)
    m, first = device.finite_or_zero(top), device.finite_or_zero(first)
    m2, o2 = m * LOG2E, (m + first) * LOG2E
    apart, apart_low = online.two_sum(o2, -m2)
    z = tl.zeros([LANES], tl.float32)
    c, low, a, step = z + first, z, z, z
    full = vocab // TILE
    for i in tl.range(0, full, loop_unroll_factor=TURNS):
        x = device.load_tile(p + i * TILE, LANES, WIDTH, STEPS)
        y = device.load_tile(q + i * TILE, LANES, WIDTH, STEPS)
        z, c, low, a, step = tile(x, y, valid, m2, o2, apart, apart_low, z, c, low, a, step, False, LANES, WIDTH, STEPS)
    if vocab % TILE != 0:
        ids = full * TILE + offsets
        valid = device.by_lane(ids < vocab, LANES, WIDTH, STEPS)
        x = device.load_tail(p, ids, vocab, LANES, WIDTH, STEPS)
        y = device.load_tail(q, ids, vocab, LANES, WIDTH, STEPS)
        z, c, low, a, step = tile(x, y, valid, m2, o2, apart, apart_low, z, c, low, a, step, True, LANES, WIDTH, STEPS)
    kl, peak_p, norm_p, peak_q, norm_q, shift, _ = online.kl_merge(z * 0.0 + m, z, c, low, a, z, z, z, 0)
    # m2 is rounded, and what was subtracted is m2 / LOG2E
    error = device.fma(-m, LOG2E, m2) * LN2
    norm_p, norm_q = norm_p + error, norm_q + error
    step = tl.max(step, axis=0)
    above_q = shift + norm_p - apart * LN2  # the log of q's mass over e^o
    good = (kl < online.LARGE) & (kl >= LEAST * step * step) & (norm_p < ABOVE)
    good &= (above_q < ABOVE) & (tl.abs(norm_q) < float("inf"))
    if tl.where(good, 0, 1) == 1:
        kl, peak_p, norm_p, peak_q, norm_q, shift, _ = online.careful(p, q, vocab, 0, LANES, WIDTH, STEPS)
    return kl, peak_p, norm_p, peak_q, norm_q, shift

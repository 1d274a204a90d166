r"""Online statistics of rows of logits, as device functions: log-sum-exp, entropy, and KL in one pass.

Every lane keeps the state of the entries it has seen, and the lanes are merged once after the last tile.

The divergence.  With d_i = q_i - p_i the difference of the *raw* logits (exact where they are close), for
any constant c

    KL(p || q) = log E_p[e^(d - c)] - E_p[d - c],

because log q_i - log p_i = d_i - log E_p[e^d].  Take c = E_p[d], the mean of d under p, and u = d - c.  Then
E_p[u] = 0 and

    KL(p || q) = log1p(E_p[phi(u)]),   phi(u) = e^u - 1 - u >= 0,

a sum of terms that are never negative: nothing cancels, and identical rows give exactly 0.  The difference of
the log-sum-exps is c + KL.

Moving the centre.  c is known only at the end, so the state of a set of entries is Z = sum e^(p - m),
A = sum e^(p - m) phi(d - c) and its own mean c.  About another centre c', with delta = c - c',

    sum w phi(u + delta) = e^delta A + phi(delta) Z   because sum w u = 0,

exact again, and again a sum of terms that are never negative.  The mean is kept as c + low, an unevaluated sum:
the identity needs sum w u = 0 to the precision of u, not to that of c.  A tile first moves the state to the mean
of everything seen, then adds its own entries about it.

The fast pass knows nothing of masks: -inf, NaN and differences that overflow leave a state that is not finite.
Such a row, or one with a divergence so large that c lies far from the difference of the log-sum-exps, is read again
by `careful`: two plain passes over the log-probabilities.
"""

from __future__ import annotations

import triton
import triton.language as tl

from grade_kernels.triton_ops import device

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
# A peak below every logit, but finite: a lane that has seen nothing needs no case of its own.
NOTHING: tl.constexpr = tl.constexpr(-3.4028234663852886e38)
# 2^FLOOR is 0, and so are its products with any log-probability.
FLOOR: tl.constexpr = tl.constexpr(-200.0)
# phi is u^2 times a polynomial up to this |u|.
NEAR: tl.constexpr = tl.constexpr(0.75)
# Where log q - log p exceeds this, p phi = q to working precision, whatever p.
CAP: tl.constexpr = tl.constexpr(20.0)
# The fast pass rounds e^u where u is about KL for most of q's mass; from here on that shows in the gradient.
LARGE: tl.constexpr = tl.constexpr(16.0)


@triton.jit
def phi_ratio(u):
    """(e^u - 1 - u) / u^2 for |u| <= NEAR: relative error below 3.9e-7, and 6e-7 with its rounding; 1/2 at 0.

    Of degree 6 in four multiply-adds and u^2, which callers that multiply by u^2 share: minimax among products of this
    form, nearly as close as the best polynomial of degree 5, of five multiply-adds.
    """
    y = u * u
    s = 2.0993548969272524e-4 * y + 8.326984010636806e-3
    return (399.364501953125 * s + u) * (s * y + 0.16666732728481293) - 0.054252516478300095


@triton.jit
def two_sum(a, b):
    """(a + b rounded, its rounding error)."""
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


@triton.jit
def log1p_parts(x):
    """log(1 + x), x >= 0, as a multiple of a short ln 2, exact in few bits, and the rest, in [-0.03, 0.7]."""
    n = tl.where(x >= 1.0, tl.floor(tl.log2(1.0 + x)), 0.0)
    rest = tl.where(n == 0.0, device.log1p(x), tl.log((1.0 + x) * tl.exp2(-n)) - n * 2.1219444005469058e-4)
    return n * 0.693359375, rest


@triton.jit
def move(delta, exponent):
    """(2^exponent e^delta, 2^exponent phi(delta)): what a state is multiplied by when its centre moves."""
    scale = tl.exp2(exponent)
    gain = tl.exp2(delta * LOG2E + exponent)
    # A floored exponent is not the true one.  Where the state counts nevertheless, the row goes to `careful`.
    gain = tl.where((exponent <= FLOOR) & (gain > 0.0), float("inf"), gain)
    near = scale * (delta * delta * phi_ratio(delta))
    return gain, tl.where(tl.abs(delta) <= NEAR, near, (gain - scale) - scale * delta)


@triton.jit
def lse_tile(x, m, z, t):
    """One tile [STEPS, LANES, WIDTH] into (m, z, t) [LANES]: z = sum e^(x - m), t = sum e^(x - m) (x - m) / ln 2.

    -inf does not count; NaN and +inf make z NaN.
    """
    peak = tl.maximum(m, device.lane_max(x))
    k = tl.maximum((m - peak) * LOG2E, FLOOR)
    scale = tl.exp2(k)
    e = tl.maximum((x - peak[None, :, None]) * LOG2E, FLOOR, propagate_nan=tl.PropagateNan.ALL)
    w = tl.exp2(e)
    return peak, z * scale + device.lane_sum(w), (t + k * z) * scale + device.lane_sum(w * e)


@triton.jit
def lse_merge(m, z, t):
    """The lanes into (peak, norm, entropy) of the row; peak 0 and norm -inf where every entry is -inf."""
    peak = tl.max(m, axis=0)
    k = tl.maximum((m - peak) * LOG2E, FLOOR)
    scale = tl.exp2(k)
    total = tl.sum(z * scale, axis=0)
    weighted = tl.sum((t + k * z) * scale, axis=0)
    peak = tl.where(total == 0.0, 0.0, peak)
    norm = tl.log(total)
    return peak, norm, norm - LN2 * (weighted / total)


@triton.jit
def lse_row(x, vocab, LANES: tl.constexpr, WIDTH: tl.constexpr, STEPS: tl.constexpr):
    """(peak, norm, entropy) of the row at x."""
    TILE: tl.constexpr = LANES * WIDTH * STEPS
    offsets = device.tile_offsets(LANES, WIDTH, STEPS)
    m = tl.full([LANES], NOTHING, tl.float32)
    z = tl.zeros([LANES], tl.float32)
    t = tl.zeros([LANES], tl.float32)
    full = vocab // TILE
    for i in range(0, full):
        m, z, t = lse_tile(device.load_tile(x + i * TILE, LANES, WIDTH, STEPS), m, z, t)
    if vocab % TILE != 0:
        m, z, t = lse_tile(device.load_tail(x, full * TILE + offsets, vocab, LANES, WIDTH, STEPS), m, z, t)
    return lse_merge(m, z, t)


@triton.jit
def kl_tile(p, q, valid, m, z, c, low, a, t, zq, tq, TAIL: tl.constexpr, ENTROPY: tl.constexpr):
    """One tile of both sides into the state; `valid` marks the entries that exist, in the TAIL.

    t is that of `lse_tile` for p; zq and tq are z and t of e^(q - c - low - m).
    """
    peak = tl.maximum(m, device.lane_max(p))
    k = tl.maximum((m - peak) * LOG2E, FLOOR)
    d = (q - p) - c[None, :, None]
    e = (p - peak[None, :, None]) * LOG2E
    if ENTROPY == 1:  # 0 * -inf is what a mask of the lowest float would make of w e
        e = tl.maximum(e, FLOOR, propagate_nan=tl.PropagateNan.ALL)
    if TAIL:
        d = tl.where(valid, d, 0.0)
        e = tl.where(valid, e, FLOOR)
    w = tl.exp2(e)
    before = z * tl.exp2(k)
    after = before + device.lane_sum(w)
    mean = (before * low + device.lane_sum(w * d)) / tl.maximum(after, 1e-30)
    gain, lift = move(low - mean, k)
    centre = c + mean
    rest = mean - (centre - c)
    u = d - mean[None, :, None]
    # log2 of w e^u, from q: from w and u it would lose its digits where p is tiny and q is not.
    origin, error = two_sum(peak, centre)
    f = (q - origin[None, :, None]) * LOG2E - ((error + rest) * LOG2E)[None, :, None]
    if TAIL:
        f = tl.where(valid, f, FLOOR)
    wq = tl.exp2(f)
    wu = w * u  # of both forms: apart they take AMD more registers than two programs of a multiprocessor have
    terms = tl.where(tl.abs(u) <= NEAR, wu * u * phi_ratio(u), (wq - w) - wu)
    a = gain * a + lift * z + device.lane_sum(terms)
    if ENTROPY == 1:
        t = (t + k * z) * tl.exp2(k) + device.lane_sum(w * e)
    if ENTROPY == 2:
        f = tl.maximum(f, FLOOR)
        tq = gain * (tq + (k + (low - mean) * LOG2E) * zq) + device.lane_sum(wq * f)
        zq = gain * zq + device.lane_sum(wq)
    return peak, after, centre, rest, a, t, zq, tq


@triton.jit
def kl_merge(m, z, c, low, a, t, zq, tq, ENTROPY: tl.constexpr):
    """The lanes into the row: (kl, peak_p, norm_p, peak_q, norm_q, shift, entropy)."""
    peak = tl.max(m, axis=0)
    k = tl.maximum((m - peak) * LOG2E, FLOOR)
    mass = z * tl.exp2(k)
    total = tl.sum(mass, axis=0)
    centre = tl.sum(mass * c, axis=0) / total
    apart = (c - centre) + low
    mean = tl.sum(mass * apart, axis=0) / total
    gain, lift = move(tl.where((z > 0.0) | (a > 0.0), apart - mean, 0.0), k)
    high, kl_low = log1p_parts(tl.sum(gain * a + lift * z, axis=0) / total)
    norm = tl.log(total)
    # A large divergence all but cancels the centre: its leading part goes first, where nothing is rounded.
    base, rest = two_sum(centre, high)
    rest += mean + kl_low
    peak_q, error = two_sum(peak, base)
    entropy = norm
    if ENTROPY == 1:
        entropy = norm - LN2 * (tl.sum((t + k * z) * tl.exp2(k), axis=0) / total)
    if ENTROPY == 2:
        exponent = k + tl.where(z > 0.0, apart - mean, 0.0) * LOG2E
        total_q = tl.sum(gain * zq, axis=0)
        entropy = tl.log(total_q) - LN2 * (tl.sum(gain * (tq + exponent * zq), axis=0) / total_q)
    return high + kl_low, peak, norm, peak_q, norm + (rest + error), base + rest, entropy


@triton.jit
def careful(p, q, vocab, ENTROPY: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr, STEPS: tl.constexpr):
    """The same from normalised log-probabilities, for rows with -inf, NaN or a large KL.

    Both -inf: the entry does not count.  p = 0 < q: it contributes q.  p > 0 = q: the row is +inf, also where
    p has underflown.
    """
    TILE: tl.constexpr = LANES * WIDTH * STEPS
    peak_p, norm_p, entropy_p = lse_row(p, vocab, LANES, WIDTH, STEPS)
    peak_q, norm_q, entropy_q = lse_row(q, vocab, LANES, WIDTH, STEPS)
    shift = (peak_q - peak_p) + (norm_q - norm_p)
    offsets = device.tile_offsets(LANES, WIDTH, STEPS)
    a = tl.zeros([LANES], tl.float32)
    g = tl.zeros([LANES], tl.float32)
    for i in range(0, tl.cdiv(vocab, TILE)):
        ids = i * TILE + offsets
        x = tl.load(p + ids, mask=ids < vocab, other=float("-inf")).to(tl.float32)
        y = tl.load(q + ids, mask=ids < vocab, other=float("-inf")).to(tl.float32)
        u = (y - x) - shift
        u = tl.minimum(tl.where(u == u, u, 0.0), CAP)
        # max(p, q e^-CAP) in place of p: with u capped, its products are those of p, or q where p is negligible.
        w = tl.exp(tl.maximum((x - peak_p) - norm_p, (y - peak_q) - (norm_q + CAP), propagate_nan=tl.PropagateNan.ALL))
        grown = device.expm1(u)
        far = tl.where(u == float("-inf"), float("inf"), grown - u)
        phi = tl.where(tl.abs(u) <= NEAR, u * u * phi_ratio(u), far)
        g += device.lane_sum(device.by_lane(w * grown, LANES, WIDTH, STEPS))
        # 0 * inf: p has underflown but is not masked, q is.
        terms = tl.where(u == float("-inf"), float("inf"), w * phi)
        a += device.lane_sum(device.by_lane(terms, LANES, WIDTH, STEPS))
    a_row = tl.sum(a, axis=0)
    # The difference of two rounded log-sum-exps may be off; e^(its error) - 1 is the sum of p (e^u - 1).
    error = device.log1p(tl.sum(g, axis=0))
    near = error * error * phi_ratio(error)
    kl = tl.where(a_row < float("inf"), tl.maximum(a_row - near, 0.0), float("inf"))
    lse = (peak_p + norm_p) + (peak_q + norm_q)
    kl = tl.where(lse == lse, kl, float("nan"))
    entropy = entropy_p
    if ENTROPY == 2:
        entropy = entropy_q
    return kl, peak_p, norm_p, peak_q, norm_q, shift + error, entropy


@triton.jit
def kl_row(p, q, vocab, ENTROPY: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr, STEPS: tl.constexpr):
    """(kl, peak_p, norm_p, peak_q, norm_q, shift, entropy) of the rows at p and q, as `KLStats` defines them.

    ENTROPY: 0 none, 1 that of p, 2 that of q.
    """
    TILE: tl.constexpr = LANES * WIDTH * STEPS
    offsets = device.tile_offsets(LANES, WIDTH, STEPS)
    m = tl.full([LANES], NOTHING, tl.float32)
    z = tl.zeros([LANES], tl.float32)
    # A lane's centre starts at a difference of its own, which leaves its first mean the precision of u instead of
    # d: that of its likeliest first entry, since elsewhere one side may be masked with a large finite number.
    valid = device.by_lane(offsets < vocab, LANES, WIDTH, STEPS)
    x = device.load_tail(p, offsets, vocab, LANES, WIDTH, STEPS)
    y = device.load_tail(q, offsets, vocab, LANES, WIDTH, STEPS)
    likeliest = x == device.lane_max(x)[None, :, None]
    c = device.finite_or_zero(device.lane_max(tl.where(likeliest & valid, y - x, float("-inf"))))
    low, a = z, z
    t, zq, tq = z, z, z
    full = vocab // TILE
    for i in range(0, full):
        x = device.load_tile(p + i * TILE, LANES, WIDTH, STEPS)
        y = device.load_tile(q + i * TILE, LANES, WIDTH, STEPS)
        m, z, c, low, a, t, zq, tq = kl_tile(x, y, valid, m, z, c, low, a, t, zq, tq, False, ENTROPY)
    if vocab % TILE != 0:
        ids = full * TILE + offsets
        valid = device.by_lane(ids < vocab, LANES, WIDTH, STEPS)
        x = device.load_tail(p, ids, vocab, LANES, WIDTH, STEPS)
        y = device.load_tail(q, ids, vocab, LANES, WIDTH, STEPS)
        m, z, c, low, a, t, zq, tq = kl_tile(x, y, valid, m, z, c, low, a, t, zq, tq, True, ENTROPY)
    kl, peak_p, norm_p, peak_q, norm_q, shift, entropy = kl_merge(m, z, c, low, a, t, zq, tq, ENTROPY)
    good = (kl < LARGE) & (tl.abs(norm_q) < float("inf")) & (entropy == entropy)
    if tl.where(good, 0, 1) == 1:
        kl, peak_p, norm_p, peak_q, norm_q, shift, entropy = careful(p, q, vocab, ENTROPY, LANES, WIDTH, STEPS)
    return kl, peak_p, norm_p, peak_q, norm_q, shift, entropy


@triton.jit
def kl_grad(p, q, kl, peak_p, norm_p, peak_q, norm_q, shift):
    """(dKL/dp_logits, dKL/dq_logits) = (-p (x + KL), q - p), x = log q - log p, at entries of a row."""
    prob = device.exp((p - peak_p) - norm_p)
    x = (q - p) - shift
    far = device.exp((q - peak_q) - norm_q) - prob
    d_q = tl.where(tl.abs(x) <= NEAR, prob * (x + x * x * phi_ratio(x)), far)
    # Where p is 0 any finite x will do.
    return -prob * (tl.where(p == float("-inf"), 0.0, x) + kl), d_q


@triton.jit
def uncap(grad, logits, inverse_cap):
    """The gradient before the soft cap; a logit of -inf counts as saturated."""
    ratio = tl.minimum(tl.maximum(logits * inverse_cap, -1.0), 1.0)
    return grad * (1.0 - ratio * ratio)


@triton.jit
def write_kl_grads(
    p, q, out_p, out_q, length, weight, inverse_cap, kl, peak_p, norm_p, peak_q, norm_q, shift,
    LANES: tl.constexpr, WIDTH: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """The gradients of a row's KL at `length` entries from p and q on; an out, weight or inverse cap may be None.

    The outs may be the logits: each entry is read first, by the thread that writes it.
    """
    TILE: tl.constexpr = LANES * WIDTH * STEPS
    offsets = device.tile_offsets(LANES, WIDTH, STEPS)
    for i in range(0, tl.cdiv(length, TILE)):
        columns = i * TILE + offsets
        here = columns < length
        x = tl.load(p + columns, mask=here, other=0.0).to(tl.float32)
        y = tl.load(q + columns, mask=here, other=0.0).to(tl.float32)
        d_p, d_q = kl_grad(x, y, kl, peak_p, norm_p, peak_q, norm_q, shift)
        if weight is not None:  # 0 even where the gradient of the row is not finite
            d_p = tl.where(weight == 0.0, 0.0, weight * d_p)
            d_q = tl.where(weight == 0.0, 0.0, weight * d_q)
        if inverse_cap is not None:
            d_p = uncap(d_p, x, inverse_cap)
            d_q = uncap(d_q, y, inverse_cap)
        if out_p is not None:
            tl.store(out_p + columns, d_p, mask=here)
        if out_q is not None:
            tl.store(out_q + columns, d_q, mask=here)

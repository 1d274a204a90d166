"""Device functions for the k candidates of one row: their logits, noise, the winner, weights and their Jacobian.

A row is a block of KP lanes, KP a power of two; `valid` marks the first k.  The mathematics is that of
`torch_ops.support`, and so are the limits: a row whose whole support is -inf has NaN weights, and a NaN in it
makes them all NaN.
"""

from __future__ import annotations

import triton
import triton.language as tl

from grade_kernels.triton_ops import device
from grade_kernels.triton_ops.suppress import is_blocked


@triton.jit
def read_support(logits, ids, lane, k, token, bits, PLACED: tl.constexpr):
    """(ids int64, values float32) of the row at `logits`, [KP] each: the logits at the ids, 0 and -inf from lane k on.

    With PLACED a `token` (int64) that the support misses takes its last place.  Ids in the bitmap `bits` (None for
    none) have -inf, unless one is that token.
    """
    valid = lane < k
    if PLACED:
        held = tl.max((valid & (ids == token)).to(tl.int32), axis=0)
        ids = tl.where((held == 0) & (lane == k - 1), token, ids)
    ids = tl.where(valid, ids, 0)
    values = tl.load(logits + ids, mask=valid, other=float("-inf")).to(tl.float32)
    if bits is not None:
        blocked = is_blocked(bits, ids)
        if PLACED:
            blocked &= ids != token
        values = tl.where(blocked, float("-inf"), values)
    return ids, values


@triton.jit
def next_below(x):
    """The next float32 towards -inf."""
    bits = x.to(tl.int32, bitcast=True)
    # Away from 0 the bits count magnitudes; below 0 comes the smallest negative subnormal, 0x80000001.
    below = tl.where(x > 0.0, bits - 1, tl.where(x < 0.0, bits + 1, -2147483647))
    stays = (x == float("-inf")) | (x != x)
    return tl.where(stays, x, below.to(tl.float32, bitcast=True))


@triton.jit
def log_add_exp(a, b):
    """log(e^a + e^b), also where one or both are infinite."""
    gap = tl.where(a == b, 0.0, tl.abs(a - b))  # inf - inf is NaN
    return tl.maximum(a, b) + device.log1p(tl.exp(-gap))


@triton.jit
def noisy_logits(values, ids, valid, row_key, seed_low, seed_high, draw, token, CONDITIONAL: tl.constexpr):
    """z = logits + Gumbel noise, up to a constant per row: float32 [KP], -inf outside `valid`.

    values float32 [KP] (any outside `valid`), ids int64 [KP], row_key int64, the seed's words and draw int32.
    With CONDITIONAL the noise is drawn conditional on argmax z = token (int64), the only argmax; a support
    without the token gives a free draw.
    """
    values = tl.where(valid, values, float("-inf"))
    peak = tl.max(values, axis=0)
    # The noise is added where float32 is finest, at a maximum of 0.
    part = values - tl.where(tl.abs(peak) < float("inf"), peak, 0.0)
    neg_gumbel = tl.log(device.exponential(seed_low, seed_high, draw, row_key, ids))
    if CONDITIONAL:
        is_token = valid & (ids == token)
        # The token's own noise serves for the maximum; without it top is inf and truncates nothing.
        own = tl.max(tl.where(is_token, neg_gumbel, float("-inf")), axis=0)
        top = tl.log(tl.sum(tl.exp(part), axis=0)) - own
        z = -log_add_exp(neg_gumbel - part, -top)
        limit = next_below(top)  # in floats z can round up to the maximum itself
        z = tl.where(z > limit, limit, z)
        z = tl.where(is_token, top, z)
    else:
        z = part - neg_gumbel
    return tl.where(valid, z, float("-inf"))


@triton.jit
def winner(z, ids, valid):
    """The id (int64) with the largest z, the lower id on a tie; always one of the valid `ids`, NaN or not."""
    # Whether tl.max passes a NaN on depends on the target, so NaNs are asked for.
    lost = tl.max((valid & (z != z)).to(tl.int32), axis=0) > 0
    best = valid & ((z == tl.max(z, axis=0)) | lost)
    return tl.min(tl.where(best, ids, 9223372036854775807), axis=0)


@triton.jit
def tempered_softmax(z, valid, tau):
    """softmax(z / tau) over the valid lanes, 0 elsewhere; the maximum goes first, so that no tau overflows."""
    z = tl.where(valid, z, float("-inf"))
    e = tl.where(valid, tl.exp((z - tl.max(z, axis=0)) / tau), 0.0)
    return tl.where(valid, e / tl.sum(e, axis=0), 0.0)


@triton.jit
def softmax_vjp(w, v):
    """J(w) v = w * (v - <w, v>) for weights that sum to 1; w and v are 0 outside the support.

    Where one weight is nearly 1, v - <w, v> is small there, and the rounding of <w, v> is not: what is left
    of the mean is subtracted too.
    """
    v -= tl.sum(w * v, axis=0)
    return w * (v - tl.sum(w * v, axis=0))

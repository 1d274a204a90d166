r"""Kullback-Leibler divergence of logits rows, exact where the two sides are nearly equal.

With x = log q - log p the divergence is written as a sum of terms that are never negative,

    KL(p || q) = sum_i (q_i - p_i + p_i log(p_i / q_i)) = sum_i p_i phi(x_i),   phi(x) = e^x - 1 - x,

which holds because p and q both sum to 1 (a Bregman divergence).  Nothing cancels: identical rows give
exactly 0, and a pair that differs by a bf16 rounding keeps all its digits.

Rounded log-sum-exps leave x off by a constant c of about 1e-7, which is a lot where p and q agree in most
digits.  It is found from sum_i p_i (e^x_i - 1) = e^c - 1 and taken back by

    sum_i p_i phi(x_i - c) = sum_i p_i phi(x_i) - phi(c),   e^(x - c) - 1 = e^-c (e^x - 1) + e^-c - 1.

That difference is 0 at least, and loses digits once KL is far below c^2 / 2 (about 1e-14 nats in float32).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from grade_kernels.common.chunks import Rows, pieces
from grade_kernels.common.head import through_softcap
from grade_kernels.common.stats import KLStats
from grade_kernels.torch_ops.logprob import Exponentials, exponentials

# phi is a power series up to this |x|: e^x - 1 - x by itself has lost a factor 2/x of precision there.
_SERIES_TO = 0.5
# Its terms: as many as make the rest less than half an ulp.
_TERMS = {torch.float32: 7, torch.float64: 14}
# Where x exceeds this cap, p_i phi(x_i) = q_i to working precision, whatever p_i; see `_capped_prob`.
_CAP = {torch.float32: 20.0, torch.float64: 40.0}


class Divergence(NamedTuple):
    stats: KLStats  # of the piece
    grad_p: Tensor | None  # p (-x - KL) [r, V]
    grad_q: Tensor | None  # q - p [r, V]


def kl_stats(p_logits: Rows, q_logits: Rows, dtype: torch.dtype) -> KLStats:
    """KL(p || q) in nats of logits [N, V], computed in `dtype`.

    Both -inf: the entry does not count.  p = 0 < q: it contributes q.  p > 0 = q: the row is +inf.
    """
    stats = KLStats.empty(p_logits.shape[0], dtype, p_logits.device)
    for a, b in pieces(p_logits, dtype):
        p, q = p_logits[a:b].to(dtype), q_logits[a:b].to(dtype)
        stats.put(a, b, divergence(p, q, exponentials(p), exponentials(q)).stats)
    return stats


def kl_grads(
    p_logits: Rows,
    q_logits: Rows,
    stats: KLStats,
    row_weights: Tensor | None,
    out_p: Tensor | None,
    out_q: Tensor | None,
    softcap: float | None = None,
) -> None:
    """row_weights * dKL/dp_logits = p (-x - KL) into out_p, and dKL/dq_logits = q - p into out_q, [N, V].

    The outs may be the logits themselves.  With `softcap` the gradient is that before the soft cap which
    made the logits.  A row of weight 0 gets gradient 0 even where KL is infinite.  No weights means 1.
    """
    dtype = stats.kl.dtype
    for a, b in pieces(p_logits, dtype):
        p, q = p_logits[a:b].to(dtype), q_logits[a:b].to(dtype)
        rows = KLStats(*(s[a:b, None] for s in stats))
        x = _log_ratio(p, q, rows.shift)
        d_p = d_q = None
        if out_q is not None:
            d_q = x.clamp(max=_CAP[dtype]).expm1_().mul_(_capped_prob(p, q, rows))
        if out_p is not None:
            d_p = x.add_(rows.kl).neg_().mul_((p - rows.peak_p).sub_(rows.norm_p).exp_())
        for grad, logits, out in ((d_p, p, out_p), (d_q, q, out_q)):
            if grad is None or out is None:
                continue
            if row_weights is not None:
                weights = row_weights[a:b, None]
                grad.mul_(weights).masked_fill_(weights == 0, 0.0)
            out[a:b] = through_softcap(grad, logits, softcap)


def divergence(p: Tensor, q: Tensor, exp_p: Exponentials, exp_q: Exponentials, grad: bool = False) -> Divergence:
    """KL(p || q) of the logits [r, V] of one piece, with its gradient to both while all they share is in cache.

    The exponentials are those of the logits; their terms are overwritten.
    """
    dtype = p.dtype
    shift = (exp_q.peak - exp_p.peak) + (exp_q.total / exp_p.total).log_()
    x = _log_ratio(p, q, shift)
    probs = exp_p.terms.div_(exp_p.total)
    # max(p, q e^-cap), see `_capped_prob`.
    weights = exp_q.terms.mul_(exp_q.total.reciprocal().mul_(math.exp(-_CAP[dtype])))
    torch.maximum(weights, probs, out=weights)
    d_q, phi = _expm1_and_phi(x)
    d_q.mul_(weights)
    correction = d_q.sum(-1, keepdim=True).log1p_()
    kl = phi.mul_(weights).sum(-1, keepdim=True).sub_(correction.square() / 2).clamp_(min=0.0)
    # 0 * inf: p has underflown but is not masked, q is.  A NaN logit is put back by its log-sum-exp.
    kl.nan_to_num_(nan=torch.inf, posinf=torch.inf)
    kl.masked_fill_((exp_p.total + exp_q.total).isnan(), torch.nan)
    fields = (kl, exp_p.peak, exp_p.norm, exp_q.peak, exp_q.norm, shift + correction)
    stats = KLStats(*(field[:, 0] for field in fields))
    if not grad:
        return Divergence(stats, None, None)
    d_q.mul_((-correction).exp_()).addcmul_(weights, (-correction).expm1_())
    return Divergence(stats, torch.sub(correction - kl, x, out=x).mul_(probs), d_q)


def _log_ratio(p: Tensor, q: Tensor, shift: Tensor) -> Tensor:
    """x = log q - log p; 0 where both are masked, the largest float where only p is, -inf where only q is."""
    x = q - p  # exact where the two are close
    x.sub_(shift)
    # NaN is -inf on both sides; a row with a NaN logit has a NaN shift and lse, which restore it.  +inf is
    # only where p is 0, whose products must stay 0.
    return x.nan_to_num_(nan=0.0, posinf=torch.finfo(x.dtype).max, neginf=-torch.inf)


def _capped_prob(p: Tensor, q: Tensor, rows: KLStats) -> Tensor:
    """max(p, q e^-cap), so that this times (e^min(x, cap) - 1) is q - p, or q where p is negligible.

    It replaces p in every product with a function of min(x, cap): p e^x may neither overflow nor, with p
    underflown, lose q.
    """
    floor = (q - rows.peak_q).sub_(rows.norm_q + _CAP[p.dtype])
    return torch.maximum((p - rows.peak_p).sub_(rows.norm_p), floor).exp_()


def _expm1_and_phi(x: Tensor) -> tuple[Tensor, Tensor]:
    """e^min(x, cap) - 1 and phi(min(x, cap)) >= 0, to full relative precision; phi(-inf) is inf.

    Split x = s + r with s in the range of the series and r the excess, 0 within it:
    e^x - 1 = (e^s - 1) + e^s (e^r - 1) and phi(x) = phi(s) + e^s (e^r - 1) - r, where what belongs to s
    dominates while r is small: e^r - 1 needs its absolute precision only.
    """
    s = x.clamp(-_SERIES_TO, _SERIES_TO)
    excess = (x - s).clamp_(max=_CAP[x.dtype] - _SERIES_TO)
    growth = excess.exp().sub_(1.0)
    # 2 phi(s) = s^2 (1 + s/3 (1 + s/4 (1 + ...))), a pass for each term
    last = _TERMS[x.dtype] + 1
    series = torch.addcmul(s, s, s, value=1.0 / last)
    for n in range(last - 1, 2, -1):
        torch.addcmul(s, s, series, value=1.0 / n, out=series)
    series.mul_(s)
    expm1 = s.add_(series, alpha=0.5)
    growth.addcmul_(expm1, growth)
    return expm1.add_(growth), growth.sub_(excess).add_(series, alpha=0.5)

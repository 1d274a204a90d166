r"""Kullback-Leibler divergence of logits rows, exact where the two sides are nearly equal.

With x = log q - log p the divergence is written as a sum of terms that are never negative,

    KL(p || q) = sum_i (q_i - p_i + p_i log(p_i / q_i)) = sum_i p_i phi(x_i),   phi(x) = e^x - 1 - x,

which holds because p and q both sum to 1 (a Bregman divergence).  Nothing cancels: identical rows give
exactly 0, and a pair that differs by a bf16 rounding keeps all its digits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from grade_kernels.stats import KLStats
from grade_kernels.torch_ops.chunks import Rows, pieces
from grade_kernels.torch_ops.head import through_softcap
from grade_kernels.torch_ops.logprob import peak_and_norm

# phi is a power series up to this |x|: expm1(x) - x has lost a factor 2/x of precision there.
_SERIES_TO = 0.25
# phi(x) = x^2/2 * sum_n _SERIES[n] x^n, as many terms as make the rest less than half an ulp.
_SERIES = {
    torch.float32: [2.0 / math.factorial(n + 2) for n in range(6)],
    torch.float64: [2.0 / math.factorial(n + 2) for n in range(12)],
}
# Where x exceeds this cap, p_i phi(x_i) = q_i to working precision, whatever p_i; see `_Pair`.
_CAP = {torch.float32: 20.0, torch.float64: 40.0}


def kl_stats(p_logits: Rows, q_logits: Rows, dtype: torch.dtype) -> KLStats:
    """KL(p || q) in nats of logits [N, V], computed in `dtype`.

    Both -inf: the entry does not count.  p = 0 < q: it contributes q.  p > 0 = q: the row is +inf.
    """
    stats = KLStats.empty(p_logits.shape[0], dtype, p_logits.device)
    for a, b in pieces(p_logits, dtype):
        stats.put(a, b, _piece_stats(p_logits[a:b].to(dtype), q_logits[a:b].to(dtype)))
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
            # +inf only where p is 0, so any finite number will do; -x is +inf only where KL is.
            d_p = x.nan_to_num_(posinf=torch.finfo(dtype).max, neginf=-torch.inf)
            d_p.add_(rows.kl).neg_().mul_((p - rows.peak_p).sub_(rows.norm_p).exp_())
        for grad, logits, out in ((d_p, p, out_p), (d_q, q, out_q)):
            if grad is None:
                continue
            if row_weights is not None:
                weights = row_weights[a:b, None]
                grad.mul_(weights).masked_fill_(weights == 0, 0.0)
            out[a:b] = through_softcap(grad, logits, softcap)


def kl_with_grads(p_logits: Rows, q_logits: Rows, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """(KL [N], its gradient to each side [N, V] in the side's dtype)."""
    stats = kl_stats(p_logits, q_logits, dtype)
    outs = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (p_logits, q_logits)]
    kl_grads(p_logits, q_logits, stats, None, *outs)
    return stats.kl.clone(), *outs


def _piece_stats(p: Tensor, q: Tensor) -> KLStats:
    peak_p, norm_p = peak_and_norm(p)
    peak_q, norm_q = peak_and_norm(q)
    shift = (peak_q - peak_p) + (norm_q - norm_p)
    rows = KLStats(shift, peak_p, norm_p, peak_q, norm_q, shift)  # no KL yet
    weights = _capped_prob(p, q, rows)
    x = _log_ratio(p, q, shift).clamp_(max=_CAP[p.dtype])
    # The difference of two rounded log-sum-exps is a poor shift where p and q agree in most digits.  One
    # Newton step on sum_i p_i e^x_i = 1 mends it.
    correction = x.expm1().mul_(weights).sum(-1, keepdim=True).log1p_()
    terms = _phi(x.sub_(correction)).mul_(weights)
    # 0 * inf: p has underflown but is not masked, q is.  A NaN logit is put back by its log-sum-exp.
    terms.nan_to_num_(nan=torch.inf, posinf=torch.inf)
    kl = terms.sum(-1, keepdim=True)
    kl = torch.where((rows.lse_p + rows.lse_q).isnan(), torch.nan, kl)
    rows = rows._replace(kl=kl, shift=shift + correction)
    return KLStats(*(stat[:, 0] for stat in rows))


def _log_ratio(p: Tensor, q: Tensor, shift: Tensor) -> Tensor:
    """x = log q - log p; 0 where both are masked, inf where only p is, -inf where only q is."""
    x = q - p  # exact where the two are close
    x.sub_(shift)
    # NaN is -inf on both sides; a row with a NaN logit has a NaN shift and lse, which restore it.
    return x.nan_to_num_(nan=0.0, posinf=torch.inf, neginf=-torch.inf)


def _capped_prob(p: Tensor, q: Tensor, rows: KLStats) -> Tensor:
    """max(p, q e^-cap), so that this times (e^min(x, cap) - 1) is q - p, or q where p is negligible.

    It replaces p in every product with a function of min(x, cap): p e^x may neither overflow nor, with p
    underflown, lose q.
    """
    floor = (q - rows.peak_q).sub_(rows.norm_q + _CAP[p.dtype])
    return torch.maximum((p - rows.peak_p).sub_(rows.norm_p), floor).exp_()


def _phi(x: Tensor) -> Tensor:
    """e^x - 1 - x to full relative precision, >= 0; inf at -inf.

    Split x = s + r with s in the range of the series and r the excess, 0 within it:
    phi(x) = phi(s) + expm1(r) (phi(s) + s + 1) - r, where phi(s) dominates while r is small.
    """
    series = _SERIES[x.dtype]
    s = x.clamp(-_SERIES_TO, _SERIES_TO)
    poly = torch.full_like(s, series[-1])
    for coefficient in reversed(series[:-1]):
        poly.mul_(s).add_(coefficient)
    poly.mul_(s).mul_(s).mul_(0.5)
    excess = x - s
    growth = excess.expm1()
    tail = s.add_(poly).add_(1.0).mul_(growth)
    return tail.sub_(excess).add_(poly)

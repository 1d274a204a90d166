"""Log-sum-exp, token log-probability and entropy of logits rows."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from grade_kernels.common.chunks import Rows, piece_rows, pieces, spans
from grade_kernels.common.head import through_softcap
from grade_kernels.common.stats import TokenStats


def log_sum_exp(logits: Rows, dtype: torch.dtype) -> Tensor:
    """lse [N] of logits [N, V], computed in `dtype`."""
    out = torch.empty(logits.shape[0], dtype=dtype, device=logits.device)
    # Two temporaries only, so pieces can be larger than those of a chain of passes.
    for a, b in spans(logits.shape[0], 8 * piece_rows(logits.shape[1], dtype, logits.device)):
        out[a:b] = logits[a:b].to(dtype).logsumexp(-1)
    return out


class Exponentials(NamedTuple):
    """A softmax in parts: log p = (logit - peak) - norm.

    Kept apart because peak + norm would round log p to the precision of the logits.
    """

    peak: Tensor  # [r, 1] largest logit
    terms: Tensor  # [r, V] e^(logit - peak)
    total: Tensor  # [r, 1] their sum

    @property
    def norm(self) -> Tensor:
        """log-sum-exp minus the peak, [r, 1]."""
        return self.total.log()


def exponentials(logits: Tensor) -> Exponentials:
    # The bound is for an all-masked row, whose norm is -inf.
    peak = logits.amax(-1, keepdim=True).clamp_(min=torch.finfo(logits.dtype).min)
    terms = (logits - peak).exp_()
    return Exponentials(peak, terms, terms.sum(-1, keepdim=True))


def token_stats(logits: Rows, tokens: Tensor | None, dtype: torch.dtype) -> TokenStats:
    """Log-probability, entropy and log-sum-exp of logits [N, V], computed in `dtype`."""
    stats = TokenStats.empty(logits.shape[0], dtype, logits.device)
    for a, b in pieces(logits, dtype):
        part = logits[a:b].to(dtype)
        stats.put(a, b, piece_stats(part, None if tokens is None else tokens[a:b], exponentials(part)))
    return stats


def piece_stats(logits: Tensor, tokens: Tensor | None, exps: Exponentials) -> TokenStats:
    """The statistics of the logits [r, V] of one piece and their exponentials."""
    norm = exps.norm
    # H = norm - sum_i p_i (logit_i - peak), both parts >= 0.  The bound makes a masked entry 0 log 0 = 0.
    centred = (logits - exps.peak).clamp_(min=-1e4)
    entropy = norm - centred.mul_(exps.terms).sum(-1, keepdim=True).div_(exps.total)
    logprob = norm  # not meaningful
    if tokens is not None:
        logprob = (logits.gather(-1, tokens[:, None]) - exps.peak).sub_(norm)
    return TokenStats(*(field[:, 0] for field in (logprob, entropy, exps.peak, norm)))


def token_stats_grad(
    logits: Rows,
    tokens: Tensor,
    stats: TokenStats,
    d_logprob: Tensor,
    d_entropy: Tensor,
    out: Tensor,
    softcap: float | None = None,
) -> None:
    """out [N, V] = d_logprob (onehot - p) - d_entropy p (log p + entropy).

    `out` may be `logits` itself.  With `softcap` the gradient is that before the soft cap which made the
    logits.
    """
    dtype = stats.norm.dtype
    for a, b in pieces(logits, dtype):
        part = logits[a:b].to(dtype)
        logp = (part - stats.peak[a:b, None]).sub_(stats.norm[a:b, None])
        grad = logp.exp()
        logp.nan_to_num_(nan=0.0, posinf=torch.inf, neginf=0.0)
        logp.add_(stats.entropy[a:b, None]).mul_(d_entropy[a:b, None]).add_(d_logprob[a:b, None])
        grad.mul_(logp).neg_()
        grad.scatter_add_(-1, tokens[a:b, None], d_logprob[a:b, None].to(grad.dtype))
        out[a:b] = through_softcap(grad, part, softcap)

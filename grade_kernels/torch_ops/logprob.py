"""Log-sum-exp, token log-probability and entropy of logits rows."""

from __future__ import annotations

import torch
from torch import Tensor

from grade_kernels.stats import TokenStats
from grade_kernels.torch_ops.chunks import Rows, piece_rows, pieces, spans
from grade_kernels.torch_ops.head import through_softcap


def log_sum_exp(logits: Rows, dtype: torch.dtype) -> Tensor:
    """lse [N] of logits [N, V], computed in `dtype`."""
    out = torch.empty(logits.shape[0], dtype=dtype, device=logits.device)
    # Two temporaries only, so pieces can be larger than those of a chain of passes.
    for a, b in spans(logits.shape[0], 8 * piece_rows(logits.shape[1], dtype, logits.device)):
        out[a:b] = logits[a:b].to(dtype).logsumexp(-1)
    return out


def peak_and_norm(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The largest logit and log-sum-exp minus it, [r, 1] each: log p = (logit - peak) - norm.

    Kept apart because their sum would round log p to the precision of the logits.
    """
    peak = logits.amax(-1, keepdim=True)
    peak = peak.masked_fill(peak == -torch.inf, 0.0)  # an all-masked row: norm is -inf
    return peak, (logits - peak).exp_().sum(-1, keepdim=True).log_()


def token_stats(logits: Rows, tokens: Tensor | None, dtype: torch.dtype) -> TokenStats:
    """Log-probability, entropy and log-sum-exp of logits [N, V], computed in `dtype`."""
    stats = TokenStats.empty(logits.shape[0], dtype, logits.device)
    for a, b in pieces(logits, dtype):
        part = logits[a:b].to(dtype)
        peak, norm = peak_and_norm(part)
        stats.peak[a:b], stats.norm[a:b] = peak[:, 0], norm[:, 0]
        logp = (part - peak).sub_(norm)
        if tokens is not None:
            stats.logprob[a:b] = logp.gather(-1, tokens[a:b, None])[:, 0]
        probs = logp.exp()
        # A masked entry contributes 0 log 0 = 0; a NaN row keeps its NaN through probs.
        logp.nan_to_num_(nan=0.0, posinf=torch.inf, neginf=0.0)
        stats.entropy[a:b] = -probs.mul_(logp).sum(-1)
    return stats


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

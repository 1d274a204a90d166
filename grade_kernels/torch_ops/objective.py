"""What `vocab_objective` takes from one chunk of logits."""

from __future__ import annotations

import torch
from torch import Tensor

from grade_kernels.common.chunks import pieces
from grade_kernels.common.head import through_softcap
from grade_kernels.common.stats import KLStats, TokenStats
from grade_kernels.torch_ops.kl import kl_grads, kl_stats
from grade_kernels.torch_ops.logprob import token_stats
from grade_kernels.torch_ops.sample import candidates
from grade_kernels.torch_ops.sweep import row_fields

Weights = tuple[Tensor | None, Tensor | None, Tensor | None]  # [r] each: of entropy, kl and ref_kl


def objective_chunk(
    logits: Tensor,
    ref_logits: Tensor | None,
    suppress: Tensor | None,
    indices: Tensor,
    tokens: Tensor | None,
    weights: Weights,
    ref_kl: bool,
    softcap: float | None,
) -> dict[str, Tensor]:
    """The fields of `VocabObjective` for r rows, except the gradient of the hidden states.

    logits, ref_logits : float32 or float64 [r, V]
        With any weight the first is overwritten by the gradient of the weighted sum before the soft cap.
    indices : int64 [r, k]
    tokens : int64 [r] or None
    weights : those of kl and ref_kl are None without `ref_logits`
    ref_kl : whether KL(ref || policy) is wanted; true where it has a weight
    """
    dtype = logits.dtype
    stats = token_stats(logits, tokens, dtype)
    kl = None if ref_logits is None else kl_stats(logits, ref_logits, dtype)
    support = candidates(logits, indices.shape[1], suppress, indices, tokens, dtype)
    out = row_fields(stats, kl, tokens is not None, support)
    if ref_logits is not None and ref_kl:
        out["ref_kl"] = kl_stats(ref_logits, logits, dtype).kl
    if any(weight is not None for weight in weights):  # the last use of the logits
        objective_grad(logits, ref_logits, stats, kl, weights, logits, softcap)
    return out


def objective_grad(
    logits: Tensor,
    ref_logits: Tensor | None,
    stats: TokenStats,
    kl: KLStats | None,
    weights: Weights,
    out: Tensor,
    softcap: float | None = None,
) -> None:
    """The gradient to logits [r, V] of the weighted sum of entropy, kl and ref_kl, into `out`, maybe the logits.

    With p the policy, q the reference and x = log q - log p the terms are -p (log p + H), -p (x + KL) and
    p - q = -p (e^x - 1).  A weight of 0 makes its term 0 even where that is infinite.  With `softcap` the
    gradient is that before the soft cap which made the logits.
    """
    for a, b in pieces(logits, logits.dtype):
        part = logits[a:b]
        w_entropy, w_kl, w_ref_kl = (None if weight is None else weight[a:b, None] for weight in weights)
        terms = []
        if w_entropy is not None:
            logp = (part - stats.peak[a:b, None]).sub_(stats.norm[a:b, None])
            prob = logp.exp()
            # 0 log 0 = 0; a NaN row keeps its NaN through prob.
            logp.nan_to_num_(nan=0.0, posinf=torch.inf, neginf=0.0)
            terms.append((logp.add_(stats.entropy[a:b, None]).mul_(prob), -w_entropy))
        if ref_logits is not None and kl is not None and (w_kl is not None or w_ref_kl is not None):
            d_kl, d_ref = (None if weight is None else torch.empty_like(part) for weight in (w_kl, w_ref_kl))
            kl_grads(part, ref_logits[a:b], kl.rows(a, b), None, d_kl, d_ref)
            if d_kl is not None and w_kl is not None:
                terms.append((d_kl, w_kl))
            if d_ref is not None and w_ref_kl is not None:  # kl_grads made q - p of it
                terms.append((d_ref, -w_ref_kl))
        grad = torch.zeros_like(part)
        for term, weight in terms:
            grad += term.mul_(weight).masked_fill_(weight == 0, 0.0)
        out[a:b] = through_softcap(grad, part, softcap)

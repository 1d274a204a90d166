"""Noise and weights over the k candidates of each row; everything here is [N, k]."""

from __future__ import annotations

import torch
from torch import Tensor

from grade_kernels.common import random
from grade_kernels.common.chunks import cpu_threads, spans

# Entries worked on at once, per thread: Philox makes a hundred passes over its int64 words, so they should
# stay in cache.
_NOISE_ENTRIES = 2**15


def noisy_logits(
    logits: Tensor, indices: Tensor, rows: Tensor, seed: int, draw: int, tokens: Tensor | None = None
) -> Tensor:
    """z = logits + Gumbel noise, up to a constant per row: [N, k], float32 or float64 as the logits.

    With `tokens` [N] the noise is drawn conditional on argmax z = token: the maximum of all z is
    lse(logits) + Gumbel whoever attains it, and the others are Gumbels truncated at that maximum,

        z_i = -log(E_i e^(-l_i) + e^(-top)),   E_i ~ Exp(1)

    (Maddison et al. 2014, Paulus et al. 2021), here through logaddexp, so that no term overflows.
    """
    z = torch.empty_like(logits)
    entries = _NOISE_ENTRIES * (cpu_threads(logits.device) or 256)
    for start, stop in spans(logits.shape[0], max(1, entries // logits.shape[1])):
        part, ids = _centre(logits[start:stop]), indices[start:stop]
        neg_gumbel = random.exponential(seed, draw, rows[start:stop], ids, logits.dtype).log_()
        if tokens is None:
            z[start:stop] = part - neg_gumbel
        else:
            z[start:stop] = _truncate(part, neg_gumbel, ids == tokens[start:stop, None])
    return z


def _truncate(logits: Tensor, neg_gumbel: Tensor, is_token: Tensor) -> Tensor:
    # The token's own noise serves for the maximum; a support without the token gives top = inf below.
    own = torch.where(is_token, neg_gumbel, -torch.inf).amax(-1, keepdim=True)
    top = logits.logsumexp(-1, keepdim=True) - own
    z = torch.logaddexp(neg_gumbel - logits, -top).neg_()
    # In floats z can round up to the maximum itself; the token must stay the only argmax.
    z = torch.minimum(z, torch.nextafter(top, torch.full_like(top, -torch.inf)))
    return torch.where(is_token, top, z)


def _centre(logits: Tensor) -> Tensor:
    """Logits minus their maximum: the noise is added where float32 is finest."""
    peak = logits.amax(-1, keepdim=True)
    return logits - torch.where(peak.isfinite(), peak, 0.0)


def winner(z: Tensor, indices: Tensor) -> Tensor:
    """The id [N] with the largest z, the lower id on a tie; always one of `indices`, NaN or not."""
    peak = z.amax(-1, keepdim=True)
    best = (z == peak) | peak.isnan()
    return torch.where(best, indices, torch.iinfo(torch.int64).max).amin(-1)


def tempered_softmax(z: Tensor, tau: float | Tensor) -> Tensor:
    """softmax(z / tau) [N, k]; the maximum goes first, so that no tau overflows."""
    return ((z - z.amax(-1, keepdim=True)) / tau).softmax(-1)


def softmax_vjp(weights: Tensor, v: Tensor) -> Tensor:
    """J(w) v = w * (v - <w, v>) over the last dimension."""
    return torch._softmax_backward_data(v, weights, -1, v.dtype)  # autograd's own: one pass instead of four

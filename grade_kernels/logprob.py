"""token_logprob: log-probability of given tokens and entropy of the full distribution."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from grade_kernels.backend import backend_for, implementation
from grade_kernels.common import checks
from grade_kernels.common.chunks import rows_of
from grade_kernels.common.stats import TokenStats


def token_logprob(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of `tokens` and entropy, both in nats and both differentiable.

    Parameters
    ----------
    logits : float [..., V]
        -inf entries count as probability 0.
    tokens : int64 [...]

    Returns
    -------
    (logprob, entropy) : [...] each
        float32 (float64 for float64 logits).  The backward pass recomputes the probabilities in row
        chunks; four scalars a row are saved beside the inputs.  Gradients have the dtype of `logits`.

    Raises
    ------
    TypeError, ValueError
        On wrong dtypes, shapes or devices.
    """
    checks.check_float("logits", logits)
    checks.check_ids("tokens", tokens, logits.shape[:-1], logits.device)
    return _TokenLogprob.apply(logits, tokens, backend_for("token_logprob", logits))


class _TokenLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tensor, backend: str) -> tuple[Tensor, Tensor]:
        dtype = checks.compute_dtype(logits)
        stats = implementation(backend).logprob.token_stats(rows_of(logits), tokens.reshape(-1), dtype)
        ctx.save_for_backward(logits, tokens, *stats)
        ctx.backend = backend
        return stats.logprob.view(tokens.shape).clone(), stats.entropy.view(tokens.shape).clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_logprob: Tensor, d_entropy: Tensor) -> tuple[Tensor | None, ...]:
        logits, tokens, *stats = ctx.saved_tensors
        rows = rows_of(logits)
        grad = torch.empty(rows.shape, dtype=logits.dtype, device=logits.device)
        d_logprob, d_entropy = d_logprob.reshape(-1), d_entropy.reshape(-1)
        ops = implementation(ctx.backend).logprob
        ops.token_stats_grad(rows, tokens.reshape(-1), TokenStats(*stats), d_logprob, d_entropy, grad)
        return grad.view(logits.shape), None, None

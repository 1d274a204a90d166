"""KL divergence and its gradients in float64, and those of a backend."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from grade_kernels import logits_kl
from grade_kernels.common.stats import KLStats

INF = torch.inf
TILE = 4096  # of the kernel: 256 lanes of 16 entries


def judge(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(KL(p || q), its gradients by p and by q) in float64, by forms that lose nothing where p and q nearly agree."""
    p, q = p.detach().double(), q.detach().double()
    logp, logq = p.log_softmax(-1), q.log_softmax(-1)
    x = torch.where((p == -INF) & (q == -INF), 0.0, logq - logp)
    far = x > 30  # where q outweighs p nothing cancels, and e^x may overflow
    first, second = logp.exp(), logq.exp()
    near = x.where(~far, 0.0)
    gap = torch.where(far, second - first, first * near.expm1())
    gained = first * torch.where(p == -INF, 0.0, x)
    kl = torch.where(far, second - first - gained, first * (near.expm1() - near)).sum(-1)
    return kl, -gained - first * kl[..., None], gap


def value_and_grads(
    a: Tensor, b: Tensor, direction: str = "policy_ref", function: Callable[..., Tensor] = logits_kl
) -> tuple[Tensor, Tensor, Tensor]:
    """The divergence and its gradients to both sides."""
    a, b = a.detach().requires_grad_(), b.detach().requires_grad_()
    value = function(a, b, direction)
    return (value.detach(), *torch.autograd.grad(value.sum(), (a, b)))


def stats_and_grads(
    ops: ModuleType, p: Tensor, q: Tensor, weights: Tensor | None = None, softcap: float | None = None
) -> tuple[KLStats, Tensor, Tensor]:
    """(stats, d_p, d_q) of a backend; the gradients in float32, which no dtype of the logits rounds."""
    stats = ops.kl.kl_stats(p, q, torch.float32)
    outs = [torch.empty(x.shape, device=x.device) for x in (p, q)]
    ops.kl.kl_grads(p, q, stats, weights, *outs, softcap)
    return stats, *outs


def assert_stats(stats: KLStats, p: Tensor, q: Tensor) -> None:
    """The log-sum-exps and their difference."""
    lse_p, lse_q = p.double().logsumexp(-1), q.double().logsumexp(-1)
    for mine, exact in ((stats.lse_p, lse_p), (stats.lse_q, lse_q)):
        torch.testing.assert_close(mine.double(), exact, rtol=3e-7, atol=3e-7)
    torch.testing.assert_close(stats.shift.double(), lse_q - lse_p, rtol=3e-7, atol=3e-6)

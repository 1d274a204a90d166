"""Textbook definitions: the oracle of the tests and the baseline of the benchmarks.

Dense, unchunked, a few lines each, differentiable by autograd, in the dtype they are given.  Noise is an
argument.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grade_kernels.common.head import Head


def topk(logits: Tensor, k: int, suppress: Tensor | None = None) -> Tensor:
    """Ids [..., k] in the order (value descending, lower id); suppressed ids come last, by id."""
    if suppress is not None:
        logits = logits.index_fill(-1, suppress, -torch.inf)
    order = logits.argsort(dim=-1, descending=True, stable=True)
    if suppress is not None:
        late = torch.isin(order, suppress).to(torch.int8).argsort(dim=-1, stable=True)
        order = order.gather(-1, late)
    return order[..., :k]


def gumbel_softmax(logits: Tensor, gumbel: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """(position of the sample [...], weights [..., k]) over the support (Jang et al. 2017)."""
    z = logits + gumbel
    return z.argmax(-1), (z / tau).softmax(-1)


def conditional_gumbel(logits: Tensor, position: Tensor, exponential: Tensor) -> Tensor:
    """z [..., k] = logits + Gumbel given argmax z = position (Maddison et al. 2014)."""
    chosen = torch.nn.functional.one_hot(position, logits.shape[-1]).bool()
    top = logits.logsumexp(-1, keepdim=True) - exponential[chosen].log().view(*position.shape, 1)
    others = -(exponential * (-logits).exp() + (-top).exp()).log()
    return torch.where(chosen, top, others)


def soft_embedding(weights: Tensor, indices: Tensor, table: Tensor) -> Tensor:
    """sum_j w_j E[i_j]."""
    return torch.einsum("...k,...kd->...d", weights, table[indices])


def kl(logits: Tensor, ref_logits: Tensor, direction: str = "policy_ref") -> Tensor:
    """sum_i p_i (log p_i - log q_i), nats; 0 log 0 = 0."""
    first, second = (logits, ref_logits) if direction == "policy_ref" else (ref_logits, logits)
    logp, logq = first.log_softmax(-1), second.log_softmax(-1)
    ratio = torch.where(logp == -torch.inf, 0.0, logp - logq)
    return (logp.exp() * ratio).sum(-1)


def token_logprob(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """(log p of the tokens, entropy), nats."""
    logp = logits.log_softmax(-1)
    return logp.gather(-1, tokens.unsqueeze(-1)).squeeze(-1), entropy(logits)


def entropy(logits: Tensor) -> Tensor:
    """-sum_i p_i log p_i, nats; 0 log 0 = 0."""
    logp = logits.log_softmax(-1)
    return -(logp.exp() * logp.masked_fill(logp == -torch.inf, 0.0)).sum(-1)


def objective(
    logits: Tensor,
    ref_logits: Tensor | None,
    entropy_weight: Tensor | float = 0.0,
    kl_weight: Tensor | float = 0.0,
    ref_kl_weight: Tensor | float = 0.0,
) -> Tensor:
    """w_entropy entropy + w_kl KL(policy || ref) + w_ref_kl KL(ref || policy) of each row."""
    total = entropy_weight * entropy(logits)
    if ref_logits is None:
        return total
    return total + kl_weight * kl(logits, ref_logits) + ref_kl_weight * kl(logits, ref_logits, "ref_policy")


def head_logits(hidden: Tensor, head: Head) -> Tensor:
    """softcap * tanh((scale * hidden @ weight.T + bias) / softcap)."""
    logits = head.scale * hidden @ head.weight.T + (0.0 if head.bias is None else head.bias)
    return logits if head.softcap is None else head.softcap * (logits / head.softcap).tanh()


def softmax_jacobian(q: Tensor) -> Tensor:
    """J(q) = diag(q) - q q^T, [..., k, k]."""
    return q.diag_embed() - q.unsqueeze(-1) * q.unsqueeze(-2)


def soft_token_vjp(estimator: str, logits: Tensor, v: Tensor, tau: float, z: Tensor, one_hot: Tensor) -> Tensor:
    """The four rules of `vjp.SoftTokenRule`; z [M, ..., k] holds the noisy logits of M draws."""

    def apply(q: Tensor) -> Tensor:
        return (softmax_jacobian(q) @ v.unsqueeze(-1)).squeeze(-1)

    if estimator in ("gumbel", "rao"):
        return torch.stack([apply((draw / tau).softmax(-1)) / tau for draw in z]).mean(0)
    pi = logits.softmax(-1)
    if estimator == "straight_through":
        return apply(pi)
    return 2 * apply((one_hot + (logits / tau).softmax(-1)) / 2) - apply(pi) / 2

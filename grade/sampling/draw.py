"""One token per row: the top-k of its logits, Gumbel noise at temperature 1, optionally within a nucleus."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from grade.config import GenerationConfig
from grade.model.policy import Policy
from grade.model.tensors import running_sum
from grade_kernels import SparseTokens, gumbel_topk, linear_gumbel_topk, vocab_head
from grade_kernels.common.random import gumbel


@dataclass
class Sampling:
    """How tokens are drawn.

    Args:
        max_new_tokens, min_new_tokens: length of a response, its end-of-sequence token included.
        top_k: candidates per token.
        tau: temperature of the relaxed weights, a number or a float tensor of no dimension; tokens do not depend on it.
        soft: feed the relaxed mixture (GRADE) instead of the token (GRADE-STE).
        ignore_eos: end-of-sequence does not end a response.
        top_p: draw from the smallest set of candidates that holds this mass; None draws from all of them.
    """

    max_new_tokens: int
    min_new_tokens: int = 0
    top_k: int = 256
    tau: float | Tensor = 1.0
    soft: bool = False
    ignore_eos: bool = False
    top_p: float | None = None


def sampling_of(generation: GenerationConfig, *, tau: float = 1.0, soft: bool = False) -> Sampling:
    """Training's sampler as the settings describe it."""
    return Sampling(
        max_new_tokens=generation.max_new_tokens,
        min_new_tokens=generation.min_new_tokens,
        top_k=generation.top_k,
        tau=tau,
        soft=soft,
        ignore_eos=generation.ignore_eos,
    )


def suppressed_ids(policy: Policy, min_new_tokens: int, ignore_eos: bool) -> Callable[[int], Tensor]:
    """Given the number of a token (from 0), the ids that may not be sampled as it."""
    early = 0 if ignore_eos else min_new_tokens - 1  # tokens that may not be the last
    unended = torch.cat([policy.suppressed, policy.eos_ids]) if early > 0 else policy.suppressed
    return lambda step: unended if step < early else policy.suppressed


def draw_tokens(
    policy: Policy, hidden: Tensor, sampling: Sampling, *, seed: int, rows: Tensor, suppress: Tensor
) -> SparseTokens:
    """One token per row: [B, d] hidden states -> SparseTokens of [B].

    Args:
        seed, rows: key the noise; [B] int64.
        suppress: [m] int64, ids that may not be drawn.
    """
    if sampling.top_p is None:
        return linear_gumbel_topk(
            hidden,
            policy.head,
            sampling.top_k,
            sampling.tau,
            seed=seed,
            rows=rows,
            suppress=suppress,
            hard=not sampling.soft,
        )
    out = vocab_head(hidden, policy.head, k=sampling.top_k, suppress=suppress)
    assert out.indices is not None and out.logits is not None and out.mass is not None  # as k was given
    lse = out.lse
    if len(suppress):  # the nucleus is one of what may be sampled, as if the others had no mass
        banned = vocab_head(hidden, policy.head, indices=suppress.expand(len(hidden), -1)).mass
        assert banned is not None  # as indices were given
        lse = lse + torch.log1p(-banned.clamp_max(1 - 1e-6))
    inside = nucleus(out.logits, lse, sampling.top_p)
    noise = gumbel(seed, 0, rows, out.indices, dtype=torch.float32)
    noisy = torch.where(inside, out.logits + noise, -torch.inf)
    tokens = out.indices.gather(-1, noisy.argmax(-1, keepdim=True)).squeeze(-1)
    return SparseTokens(out.indices, torch.softmax(noisy / sampling.tau, -1), tokens, out.mass, hard=not sampling.soft)


def draw_from_product(
    policy: Policy, product: Tensor, sampling: Sampling, *, seed: int, rows: Tensor, suppress: Tensor
) -> SparseTokens:
    """The same without a nucleus, from hidden @ head.weight^T [B, V], which is overwritten."""
    return gumbel_topk(
        policy.head.finish(product),
        sampling.top_k,
        sampling.tau,
        seed=seed,
        rows=rows,
        suppress=suppress,
        hard=not sampling.soft,
    )


def nucleus(logits: Tensor, lse: Tensor, top_p: float) -> Tensor:
    """[..., k] bool: the fewest leading candidates that hold `top_p` of the distribution's mass.

    Args:
        logits: [..., k], descending.
        lse: [...], log-sum-exp over everything that may be sampled.
        top_p: mass in (0, 1]. Where all k candidates hold less, all are kept; so are they at 1, whatever rounding
            does to a sum of 1.
    """
    if top_p >= 1:
        return torch.ones_like(logits, dtype=torch.bool)
    mass = torch.exp(logits - lse[..., None])
    before = running_sum(mass, -1) - mass  # mass of the candidates ahead of this one
    return before < top_p

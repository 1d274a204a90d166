"""A step's gradient by the published algorithm (arXiv 2601.11574), token by token with autograd, from its description.

What replay is measured against, for the same model, reward, noise and loss. Per token: the policy runs over the whole
prefix without a KV cache, checkpointed, so that backward runs it again; its k best logits with Gumbel noise become
weights; their mixture `E[indices]` is the straight-through soft token. Autograd then runs through the whole loop.
`cached` carries a KV cache with gradients in place of the growing passes.

Where the published code is wrong or wasteful beyond its algorithm, this is not, so that replay is not measured against
a straw man: the whole batch runs at once; only the last position meets the vocabulary head; a step is checkpointed as
a whole, with its prefix put together inside, so that a token's embedding is kept once; KL is in the loss, a few
positions at a time and checkpointed, so that of the vocabulary's size only the logits are kept; its reference is one
parallel pass shared with the reward.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import kl_div
from torch.utils.checkpoint import checkpoint

from grade.model.policy import Policy
from grade.rewards.shared import SharedReward
from grade_kernels.common.random import gumbel
from grade_kernels.reference import head_logits

# Positions of KL at a time: the head is read once for all of them, and four arrays [B, 16, V] are alive.
_KL_POSITIONS = 16


def published_step(
    policy: Policy,
    reward: SharedReward,
    prompt_ids: Tensor,
    *,
    length: int,
    k: int,
    tau: float,
    seed: int,
    rows: Tensor,
    kl_coef: float,
    cached: bool,
    phase: Callable[[str], AbstractContextManager],
) -> Tensor:
    """Sample `length` tokens and add the gradient of  -mean reward + kl_coef * mean KL  to the policy's parameters.

    Args:
        prompt_ids: [B, P] int64, without padding.
        rows: [B, S] int64, noise rows.
        cached: carry a KV cache with gradients.
        phase: given a phase's name, a context that times it.

    Returns:
        [B, S] int64, the tokens.
    """
    prompt = policy.embed(prompt_ids)
    fed: list[Tensor] = []
    tokens: list[Tensor] = []
    logits: list[Tensor] = []
    with phase("rollout"):
        last_hidden = _cached(policy) if cached else _whole_prefix(policy)
        for step in range(length):
            hidden = last_hidden(prompt, fed)
            step_logits = _logits(policy, hidden)  # [B, V]
            token, x = _soft_token(policy, step_logits, rows[:, step], k, tau, seed)
            logits.append(step_logits)
            tokens.append(token)
            fed.append(x)
    response = torch.stack(fed, dim=1)  # [B, S, d]
    with phase("reference and reward"):
        whole = torch.cat([prompt, response], dim=1)
        with policy.state(adapters=False):
            base = policy.hidden(whole, None)
        score = reward.head.reward(base.float().mean(1))
        before = base[:, prompt_ids.shape[1] - 1 : -1]  # [B, S, d]
        kl = [
            _checkpoint(partial(_kl, policy), before[:, here], *logits[here])
            for here in (slice(start, start + _KL_POSITIONS) for start in range(0, length, _KL_POSITIONS))
        ]
        loss = kl_coef * torch.cat(kl, dim=1).mean() - score.mean()
    with phase("backward"):
        loss.backward()
    return torch.stack(tokens, dim=1)


def _whole_prefix(policy: Policy) -> Callable:
    """The last position's hidden state [B, d] from all embeddings, computed anew."""

    def run(prompt: Tensor, *fed: Tensor) -> Tensor:
        whole = torch.cat([prompt, *(x[:, None] for x in fed)], dim=1)
        return policy.hidden(whole, None)[:, -1]

    def last_hidden(prompt: Tensor, fed: list[Tensor]) -> Tensor:
        return _checkpoint(run, prompt, *fed)

    return last_hidden


def _cached(policy: Policy) -> Callable:
    """The same from the newest embedding alone; keys and values of the others keep their graph."""
    cache = policy.new_cache()

    def last_hidden(prompt: Tensor, fed: list[Tensor]) -> Tensor:
        return policy.hidden(fed[-1][:, None] if fed else prompt, None, cache)[:, -1]

    return last_hidden


def _soft_token(policy: Policy, logits: Tensor, rows: Tensor, k: int, tau: float, seed: int) -> tuple[Tensor, Tensor]:
    """(tokens [B], their straight-through embeddings [B, d])."""
    best = logits.topk(k, dim=-1)
    noisy = best.values + gumbel(seed, 0, rows, best.indices, dtype=logits.dtype)
    weights = torch.softmax(noisy / tau, dim=-1).to(policy.dtype)  # [B, k]
    token = best.indices.gather(-1, noisy.argmax(-1, keepdim=True)).squeeze(-1)
    mixture = (weights[..., None] * policy.embed(best.indices)).sum(-2)  # E[indices]: [B, k, d] is kept
    return token, policy.embed(token) + mixture - mixture.detach()


def _logits(policy: Policy, hidden: Tensor) -> Tensor:
    """[..., d] -> [..., V] float32, without a pass more than the head has parts."""
    head = policy.head
    if (head.scale, head.softcap, head.bias) == (1.0, None, None):
        return (hidden @ head.weight.T).float()
    return head_logits(hidden, head).float()


def _kl(policy: Policy, reference_hidden: Tensor, *logits: Tensor) -> Tensor:
    """[B, s], kl(policy‖ref) at s positions, whose logits [B, V] are given one by one."""
    reference = _logits(policy, reference_hidden).log_softmax(-1)
    ours = torch.stack(logits, dim=1).log_softmax(-1)
    return kl_div(reference, ours, log_target=True, reduction="none").sum(-1)


def _checkpoint(function: Callable, *arguments: Tensor) -> Tensor:
    """Without the random state, which nothing reads."""
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)

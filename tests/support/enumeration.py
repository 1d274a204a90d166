"""A policy small enough to enumerate, methods on it, and the terms of a response from full logits by autograd."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from itertools import combinations_with_replacement
from typing import NamedTuple

import torch
from rollouts import draw
from tiny import VOCAB, tiny_policy
from torch import Tensor

from grade.config import GenerationConfig, MethodConfig, TrainConfig
from grade.methods import make_method
from grade.methods.services import Services
from grade.rewards.base import RewardFunction
from grade.rollout import Rollout

CANDIDATES = 5  # more than can be drawn
PROMPT = [5, 9]
RAGGED = [(0,), (1, 0), (1, 1, 0), (1, 1, 1)]  # 0 ends a response, or it has three tokens
RAGGED_PROMPTS = [[5, 9, 2], [7, 11, 13, 17, 19]]


def symbol_policy(symbols):
    """A tiny Llama that knows a few symbols only: entropy and KL are over 61 ids, sampling is not."""
    return tiny_policy("llama", dtype=torch.float64, unknown=VOCAB - symbols)


class ConstantReward(RewardFunction):
    """The same reward for every response."""

    def __init__(self, reward: float):
        self.reward = reward

    def score(self, rollout: Rollout) -> Tensor:
        return torch.full((len(rollout),), self.reward)


def padded(responses):
    """Tokens [B, S] of responses of any lengths, and which of them are real."""
    width = max(map(len, responses))
    tokens = torch.tensor([[*r, *[0] * (width - len(r))] for r in responses])
    return tokens, torch.tensor([[s < len(r) for s in range(width)] for r in responses])


def draws(count, responses):
    """(multiset of `responses` indices, in how many orders it can be drawn)."""
    for group in combinations_with_replacement(range(responses), count):
        yield list(group), math.factorial(count) // math.prod(map(math.factorial, Counter(group).values()))


def given_rollout(policy, tokens: Tensor, copies: int = 1, mask: Tensor | None = None) -> Rollout:
    """The responses `tokens` [B, S] as if they had been sampled; `mask` [B, S] bool says what of them is real."""
    shape = tokens.shape
    mask = torch.ones(shape, dtype=torch.bool) if mask is None else mask
    ids = torch.tensor([PROMPT]).expand(shape[0], -1)
    return Rollout(
        ids,
        torch.ones_like(ids, dtype=torch.bool),
        tokens,
        mask,
        torch.arange(CANDIDATES).expand(*shape, -1),
        torch.ones(shape),
        torch.zeros(shape, dtype=torch.int64),
        ignore_eos=True,
        samples_per_prompt=copies,
    )


def ragged_rollout(policy, copies=4, prompts=RAGGED_PROMPTS) -> Rollout:
    """Responses of 1 to 6 tokens to two prompts of different lengths."""
    policy.eos_ids = torch.arange(10)
    rollout = draw(policy, prompts, copies=copies, max_new_tokens=6, top_k=9)
    assert len(set(rollout.mask.sum(1).tolist())) > 2
    return rollout


def method_of(
    policy,
    reward,
    name,
    *,
    batch,
    accumulation=1,
    copies=1,
    max_new_tokens=6,
    own=None,
    activation_checkpointing=False,
    **common,
):
    """The method `name`; `own` are the settings of its section, `common` those that all methods share."""
    method = MethodConfig(name=name, **common)
    if own:
        method = replace(method, **{name: replace(getattr(method, name), **own)})
    generation = GenerationConfig(max_new_tokens=max_new_tokens, min_new_tokens=0, samples_per_prompt=copies)
    train = TrainConfig(batch_size=batch, accumulation_steps=accumulation)
    return make_method(
        policy, reward, method, generation, train, Services(), seed=0, activation_checkpointing=activation_checkpointing
    )


def step_gradients(method, rollout, *, rate=0.0, step=0):
    """(the policy's gradient at every update of a step, its metrics); an update moves by `rate` times the gradient."""
    policy, taken = method.policy.parameters(), []
    others = [p for group in method.parameter_groups() for p in group["params"]]

    @torch.no_grad()
    def update():
        taken.append(torch.cat([p.grad.flatten() for p in policy]))
        for p in [*policy, *others]:
            if rate and p.grad is not None:
                p.sub_(rate * p.grad)
            p.grad = None
        return taken[-1].norm().item()

    metrics = method.step([rollout], step, update)
    return taken, metrics


class FullTerms(NamedTuple):
    """[B, S] along a rollout with 0 at padding, and [B, S, d] `hidden`; all but `full_ref` differentiable."""

    logprob: Tensor  # restricted to the rollout's candidates that can be drawn
    full: Tensor  # of the whole vocabulary
    full_ref: Tensor
    entropy: Tensor
    kl: Tensor
    ref_kl: Tensor
    hidden: Tensor


def full_terms(policy, rollout: Rollout) -> FullTerms:
    """What the methods need of policy and reference, from transformers' own logits over the whole vocabulary."""
    whole = torch.cat([rollout.prompt_mask, rollout.mask], dim=1)
    inputs = dict(
        inputs_embeds=policy.embed(torch.cat([rollout.prompt_ids, rollout.tokens], dim=1)),
        attention_mask=whole.long(),
        position_ids=(whole.long().cumsum(1) - 1).clamp_min(0),
        use_cache=False,
        output_hidden_states=True,
    )
    predicting = slice(rollout.prompt_ids.shape[1] - 1, -1)
    out = policy.causal_lm(**inputs)
    with policy.state(adapters=False), torch.no_grad():
        ref = policy.causal_lm(**inputs).logits[:, predicting]
    logits, mask, token = out.logits[:, predicting], rollout.mask, rollout.tokens[..., None]
    p, q = logits.log_softmax(-1), ref.log_softmax(-1)
    among = logits.index_fill(-1, policy.suppressed, -torch.inf).gather(-1, rollout.indices).log_softmax(-1)
    logprob = torch.where(rollout.indices == token, among, 0.0).sum(-1)
    values = (
        logprob,
        p.gather(-1, token)[..., 0],
        q.gather(-1, token)[..., 0],
        -(p.exp() * p).sum(-1),
        (p.exp() * (p - q)).sum(-1),
        (q.exp() * (q - p)).sum(-1),
    )
    return FullTerms(*(v * mask for v in values), out.hidden_states[-1][:, predicting])

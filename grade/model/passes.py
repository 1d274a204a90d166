"""The two parallel passes over prompt + response: the policy's, and the frozen base's.

The base pass serves two readers at once, where the base is the reference. Its hidden states one position early give
the reference logits; those of the response, with the prompt's, are the features of a reward that shares the base. So
one forward gives both values, and one backward both gradients with respect to the response's embeddings.

Nothing before the response depends on its embeddings, so either pass may be two: the prompts', each distinct one once,
and the responses', which read the prompts' keys and values. A backward pass to the embeddings then leaves the prompts'
positions out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from grade.model.cache import repeat_rows
from grade.model.policy import Policy
from grade.planning.prompt_pass import PassSizes
from grade.rollout import Rollout
from grade_kernels import SparseTokens, soft_embedding


@dataclass
class BasePass:
    """Hidden states of the frozen base, and of the reference.

    Args:
        reference: [B, S, d], the states whose logits predict the response's tokens: the base's, or those of the
            policy's own reference where it has one (`Policy.has_reference`).
        response: [B, S, d], the states at the response's tokens.
        prompt_sum, prompt_count: [B, d] float32 (float64 for float64 models) and [B], the prompt's states summed over
            real tokens.
    """

    reference: Tensor
    response: Tensor
    prompt_sum: Tensor
    prompt_count: Tensor


def fed_embeddings(rollout: Rollout, table: Tensor, scale: float) -> Tensor:
    """[B, S, d], what sampling fed back, as rows of `table` [V, d]: tokens, or for soft GRADE the mixtures.

    Padding is zero.
    """
    if rollout.weights is None:
        rows = torch.nn.functional.embedding(rollout.tokens, table)
    else:
        fed = SparseTokens(rollout.indices, rollout.weights, rollout.tokens, rollout.token_weight, hard=False)
        rows = soft_embedding(fed, table)
    return rows * scale * rollout.mask[..., None]


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    """float32 for sums over half-precision and float32 values, float64 for float64."""
    return torch.promote_types(tensor.dtype, torch.float32)


def policy_pass(
    policy: Policy,
    rollout: Rollout,
    x: Tensor,
    *,
    prompt_cache: bool = True,
    hops: int = 0,
    apart: bool | None = None,
    dropout: bool = False,
    activation_checkpointing: bool = False,
    adapters: bool = True,
    compiled: bool = False,
) -> Tensor:
    """[B, S, d] hidden states that predict the response's tokens.

    Args:
        x: [B, S, d], the response's embeddings.
        prompt_cache: compute each distinct prompt once, with a graph where there is one, and let its samples read its
            KV cache, if that pays (`PassSizes.pay_apart`). Exact up to rounding. Not with `activation_checkpointing`,
            nor with `dropout`, which samples of a prompt would share, nor where the model cannot
            (`Policy.keeps_prompt_graph`).
        hops: about how many backward passes to `x` will follow.
        apart: whether the prompts' pass is one of its own where that can be; None: where it pays.
        compiled: run compiled layers where the policy has them (`Switches.compile_layers`).
    """
    can = prompt_cache and policy.keeps_prompt_graph and not (activation_checkpointing or dropout)
    if can and apart is None:  # sharded layers need the same passes of all processes, whose batches differ in sizes
        apart = policy.going_on(pass_sizes(policy, rollout).pay_apart(hops))
    with policy.state(
        adapters=adapters, dropout=dropout, activation_checkpointing=activation_checkpointing, compiled=compiled
    ):
        if can and apart:
            before, response = _prompts_first(policy, rollout, x)
            last = before[:, -1:].repeat_interleave(rollout.samples_per_prompt, dim=0)
            return torch.cat([last, response[:, :-1]], dim=1)
        hidden = policy.hidden(*_whole_sequence(policy, rollout, x), padded=rollout.padded)
    prompt = rollout.prompt_ids.shape[1]
    return hidden[:, prompt - 1 : -1]


def base_pass(
    policy: Policy,
    rollout: Rollout,
    x: Tensor,
    *,
    prompt_cache: bool = True,
    activation_checkpointing: bool = False,
    reads_base: bool = True,
    compiled: bool = False,
) -> BasePass:
    """The frozen base over prompt + response, and in a pass of its own a reference that is not the base.

    Args:
        x: [B, S, d], the response's embeddings; gradients flow to them.
        prompt_cache: compute each distinct prompt once, without a graph, and let its samples read its KV cache.
            Exact up to rounding: nothing before the response depends on `x`. Not with `activation_checkpointing`,
            whose recomputation would write the cache twice, nor where the model cannot (`Policy.reads_prompt_cache`).
        reads_base: whether anyone reads states of the base. If not, a reference that is not the base saves its pass,
            and all states are the reference's.
        compiled: run compiled layers where the policy has them (`Switches.compile_layers`).
    """
    cached = prompt_cache and policy.reads_prompt_cache and not activation_checkpointing
    how = {"activation_checkpointing": activation_checkpointing, "compiled": compiled}
    before, response = _frozen_states(policy, rollout, x, cached, reference=not reads_base, **how)
    others = (before, response)
    if policy.has_reference and reads_base:
        others = _frozen_states(policy, rollout, x, cached, reference=True, **how)
    reference = torch.cat([others[0][:, -1:], others[1][:, :-1]], dim=1)
    prompt_sum = (before.to(accumulation_dtype(before)) * rollout.prompt_mask[..., None]).sum(1)
    return BasePass(reference, response, prompt_sum, rollout.prompt_mask.sum(1))


def _frozen_states(
    policy: Policy,
    rollout: Rollout,
    x: Tensor,
    cached: bool,
    *,
    activation_checkpointing: bool,
    reference: bool,
    compiled: bool,
) -> tuple[Tensor, Tensor]:
    """States of prompt [B, P, d] and response [B, S, d], of the reference or of the base."""
    if not cached:
        how = {"activation_checkpointing": activation_checkpointing, "compiled": compiled}
        with policy.state(adapters=False, reference=reference, **how):
            hidden = policy.hidden(*_whole_sequence(policy, rollout, x), padded=rollout.padded)
        prompt = rollout.prompt_ids.shape[1]
        return hidden[:, :prompt], hidden[:, prompt:]
    with policy.state(adapters=False, reference=reference, compiled=compiled):
        before, response = _prompts_first(policy, rollout, x, graph=False)
    return before.repeat_interleave(rollout.samples_per_prompt, dim=0), response


def _prompts_first(policy: Policy, rollout: Rollout, x: Tensor, *, graph: bool = True) -> tuple[Tensor, Tensor]:
    """States of the distinct prompts [U, P, d], and of the responses [B, S, d] that read the prompts' caches.

    Args:
        graph: whether the prompts' pass is part of the graph, if there is one.
    """
    copies = rollout.samples_per_prompt
    cache = policy.new_cache()
    with torch.set_grad_enabled(graph and torch.is_grad_enabled()):
        embeddings = policy.embed(rollout.prompt_ids[::copies]).to(x.dtype)
        before = policy.hidden(embeddings, rollout.prompt_mask[::copies], cache, padded=rollout.padded)
        if copies > 1:
            repeat_rows(cache, copies)
    whole = torch.cat([rollout.prompt_mask, rollout.mask], dim=1)
    return before, policy.hidden(x, whole, cache, padded=rollout.padded)


def pass_sizes(policy: Policy, rollout: Rollout) -> PassSizes:
    """What decides whether the policy's pass over a rollout is two."""
    (responses, prompt), (_, response) = rollout.prompt_ids.shape, rollout.tokens.shape
    return PassSizes(
        responses=responses,
        prompts=responses // rollout.samples_per_prompt,
        prompt=prompt,
        response=response,
        width=policy.embedding.shape[1],
        item=policy.dtype.itemsize,
        padded=rollout.padded,
        on_gpu=policy.device.type != "cpu",
    )


def _whole_sequence(policy: Policy, rollout: Rollout, x: Tensor) -> tuple[Tensor, Tensor]:
    """Embeddings [B, P + S, d] and mask [B, P + S] of prompt and response."""
    embeddings = torch.cat([policy.embed(rollout.prompt_ids).to(x.dtype), x], dim=1)
    return embeddings, torch.cat([rollout.prompt_mask, rollout.mask], dim=1)

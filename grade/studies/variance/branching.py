"""Responses that share a prefix, and what every estimator makes of the token after it (`steps.py`).

A prefix is a training prompt and the first tokens of a response, as many as chance says, each number equally often.
COPIES responses go on from it, and PATHS of them are differentiated. So the gradients at the logits of the first token
after it are independent draws, given the prefix, at one and the same distribution of tokens. All responses have the
same length, whatever their prefix's, and are replayed as responses to the prompt: the reward sees what it would see of
them in training.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from grade.config.studies import COPIES
from grade.errors import present
from grade.methods.base import kl_weight
from grade.methods.grade import Grade
from grade.model.policy import Policy
from grade.replay.replay import Prepared, prepare
from grade.replay.score import sampled_logits
from grade.replay.score import score as evaluated
from grade.rollout import Rollout, pad_prompts
from grade.sampling.draw import Sampling
from grade.sampling.sample import sample
from grade.studies.variance.steps import Products, products, scores
from grade.training.responses import prompt_numbers
from grade_kernels import logits_kl

PATHS = 8
"""Of a prefix's responses, those that the estimators differentiate: a return is had for a fraction of that, and noisier
by far."""
Rule = tuple[str, float]
"""(local rule, temperature)"""
_TOKENS = ("tokens", "mask", "indices", "token_weight", "rows")


def branched(
    policy: Policy, ids: Tensor, mask: Tensor, sampling: Sampling, *, at: int, copies: int, seed: int, first_row: int
) -> Rollout:
    """`copies` responses to each of U prompts [U, P], which have their first `at` tokens in common.

    Args:
        sampling: of responses of one length, its least and its greatest.
        first_row: noise rows from here on are used, U * (copies + 1) * length of them.
    """
    length, prompts = sampling.max_new_tokens, len(ids)
    device = ids.device
    starts = first_row + torch.arange(prompts * (copies + 1), device=device) * length
    ends = starts[prompts:] + at
    if at == 0:
        return sample(policy, ids, mask, sampling, seed=seed, first_rows=ends, samples_per_prompt=copies)
    common = replace(sampling, max_new_tokens=at, min_new_tokens=at + 1)  # no token of it may end the response
    prefix = sample(policy, ids, mask, common, seed=seed, first_rows=starts[:prompts])
    rest = sample(
        policy,
        torch.cat([ids, prefix.tokens], dim=1),
        torch.cat([mask, prefix.mask], dim=1),
        replace(sampling, max_new_tokens=length - at, min_new_tokens=length - at),
        seed=seed,
        first_rows=ends,
        samples_per_prompt=copies,
    )
    together: dict[str, Any] = {
        name: torch.cat([getattr(prefix, name).repeat_interleave(copies, dim=0), getattr(rest, name)], dim=1)
        for name in _TOKENS
    }
    width = rest.prompt_ids.shape[1] - at
    return replace(
        rest,
        prompt_ids=rest.prompt_ids[:, :width],
        prompt_mask=rest.prompt_mask[:, :width],
        min_new_tokens=length,
        **together,
    )


def prefix_lengths(length: int, seed: int) -> Iterator[int]:
    """0 to length - 1, each equally often: a fresh order every time round."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(length, generator=generator).tolist()


def measured(
    method: Grade, prompts: Sequence[list[int]], rules: Sequence[Rule], *, prefixes: int, seed: int
) -> Iterator[dict[Rule | None, Products]]:
    """The products of every rule, and under None those of the score function, prefix by prefix, [1] each.

    Args:
        method: `grade-ste` with responses of one length.
        prefixes: how many.
    """
    policy, length = method.policy, method.generation.max_new_tokens
    lengths = prefix_lengths(length, seed)
    for number in range(prefixes):
        at = next(lengths)
        chosen = prompt_numbers(number, 1, len(prompts), seed)
        ids, mask = pad_prompts([prompts[n] for n in chosen], policy.pad_id, policy.device)
        first = number * (COPIES + 1) * length
        rollout = branched(policy, ids, mask, method.sampling(0), at=at, copies=COPIES, seed=seed, first_row=first).of(
            "policy", chosen
        )
        yield of_prefix(method, rollout, at, rules)


def of_prefix(method: Grade, rollout: Rollout, at: int, rules: Sequence[Rule]) -> dict[Rule | None, Products]:
    """The same of responses that share a prompt and their first `at` tokens; every response counts as a step of one."""
    config, (size, length) = method.config, rollout.tokens.shape
    weight = kl_weight(rollout.mask, config.kl_reduction, config.kl_coef, length, 1)  # [m, S], of one response
    settings = method.settings(0)
    valued = evaluated(method.policy, method.reward, rollout, settings)
    # KL at the token's own step does not depend on the token.
    returns = valued.reward.double() - (weight * valued.kl.double())[:, at + 1 :].sum(1)
    part = rollout.cut(0, min(PATHS, size))
    weight = weight[: len(part)]
    prepared = prepare(
        method.policy, method.reward, part, settings, reward_weight=weight.new_ones(len(part)), kl_weight=weight
    )
    done = prepared.done
    logits = sampled_logits(method.policy, part, done.real, present(done.swept.logits))
    p = done.real.dense(logits)[:1, at].double().softmax(-1)  # [1, k]
    indices = rollout.indices[:, at]
    assert bool((indices == indices[:1]).all())  # drawn from copies of one row of logits
    drawn = (indices == rollout.tokens[:, at, None]).double()
    score = scores(returns[None], drawn[None], p)
    kl = -weight[0, at] * _kl_gradient(prepared, at, p, config.kl_direction)

    def of(path: Tensor | None) -> Products:
        return products(path, score, kl, p)

    result: dict[Rule | None, Products] = {None: of(None)}
    for estimator, tau in rules:
        options = replace(settings, estimator=estimator, tau=tau, max_hops=length - 1)
        gradient = done.real.dense(prepared.logit_gradient(options))[:, at]
        result[estimator, tau] = of(-gradient[None].double())  # of the objective, not of the loss
    return result


def _kl_gradient(prepared: Prepared, at: int, p: Tensor, direction: str) -> Tensor:
    """[1, k], of KL at token `at` with respect to the candidates' logits, without what it says of their mass among the
    whole vocabulary: it sums to 0."""
    done, head = prepared.done, prepared.policy.head
    ours, reference = (done.real.dense(h.detach())[:1, at] for h in (done.hidden, done.frozen.reference))
    with torch.enable_grad():
        logits = head.logits(ours).requires_grad_()
        (gradient,) = torch.autograd.grad(logits_kl(logits, head.logits(reference), direction).sum(), logits)
    found = torch.where(p > 0, gradient.gather(1, prepared.rollout.indices[:1, at]).double(), 0.0)
    return found - p * found.sum(-1, keepdim=True)

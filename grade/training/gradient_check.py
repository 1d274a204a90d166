"""Whether GRADE can follow a reward: does its gradient predict what swapping a token does?

GRADE moves a token's probabilities by  v_j = <dr/dx, E[j]>,  the reward's gradient at the token's embedding times the
embeddings of the candidates. That is a first-order estimate of what the reward would be with candidate j in its place,
and nothing makes a reward that has only seen whole tokens agree with it. Here it is compared with the reward after the
swap, and after half of it, where the embedding is the mean of both tokens, as a relaxed token's may be.

Candidates that end the response are left out, and so are tokens that do: what ending does to the length is not in the
gradient (docs/methods/grade.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from grade.config import Config
from grade.config.methods import BY_VALUE
from grade.errors import GradeError, present
from grade.model.policy import Policy
from grade.replay.score import RealTokens, ScoreSettings, forward, frozen_passes, sampled_logits, vjp
from grade.rewards.base import Reward
from grade.rewards.weighted import WeightedReward
from grade.rollout import Rollout, pad_prompts
from grade.sampling.draw import sampling_of
from grade.sampling.sample import sample
from grade.terminal import counted
from grade.training.evaluation import score_settings
from grade.training.responses import prompt_numbers
from grade.training.swap_statistics import LEAST_RESPONSES, Agreement, Swaps, agreements, plain, table, verdict

RESPONSES, SWAPS = 256, 4
"""Responses, and swaps that are drawn in each of them from either distribution."""
_FIRST_ROW = 2**41
"""Noise rows of the responses: of no training step and no evaluation."""


@dataclass(frozen=True)
class GradientCheck:
    """What `check_gradient` has found.

    Attributes:
        rows: agreement by how the candidates were drawn and by part of the response.
        verdict: what it means, in sentences.
        responses: how many were sampled.
        reward: what is raised, in words.
    """

    rows: list[Agreement]
    verdict: str
    responses: int
    reward: str

    def __str__(self) -> str:
        return f"{table(self.rows).markdown()}\n\n{self.verdict}"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"reward": self.reward, "responses": self.responses, "verdict": self.verdict, "rows": plain(self.rows)}


def check_gradient(
    policy: Policy,
    reward: Reward,
    prompts: Sequence[list[int]],
    config: Config,
    *,
    responses: int = RESPONSES,
    swaps: int = SWAPS,
    adapters: bool = True,
) -> GradientCheck:
    """Sample responses, swap tokens in them, and compare what the reward's gradient predicts with what happens.

    Pairs of a position and another of its candidates are drawn by the policy's probability of the candidate ("policy"),
    and evenly ("top_k"). Functions beside a differentiable reward are left out, and none is called.

    Args:
        prompts: token ids; where there are fewer than responses they are asked several times.
        config: sections `generation`, `method` and `train` say how responses are sampled and fed.
        responses: at least 8.
        swaps: in every response, from either distribution.
        adapters: False samples from the base model.

    Raises:
        GradeError: the reward has no gradient, or there is nothing to swap.
    """
    if responses < LEAST_RESPONSES:
        raise GradeError(f"responses is {responses}: the intervals of this check need at least {LEAST_RESPONSES}.")
    if swaps < 1:
        raise GradeError(f"swaps is {swaps}: swap at least one token in every response.")
    if not reward.differentiable:
        raise _no_gradient(f"{reward.raises} has no gradient")
    terms = reward.terms if isinstance(reward, WeightedReward) else []
    if terms and not any(term.weight for term in terms if term.reward.differentiable):
        setting = "reward.proxy_weight" if any(term.proxy for term in terms) else "reward.weight"
        raise _no_gradient(f"what has a gradient in {reward.raises} has the weight 0 ({setting})")
    settings = score_settings(config.method, policy.device)
    settings.training = any(term.proxy for term in terms)  # they count nowhere else
    settings.activation_checkpointing = config.method.activation_checkpointing is True
    generator = torch.Generator().manual_seed(config.seed)
    found: dict[str, list[Swaps]] = {"policy": [], "top_k": [], "half-way": []}
    numbers = prompt_numbers(0, responses, len(prompts), config.seed)
    size = config.train.batch_size
    for start in counted("Gradient check, responses", range(0, responses, size), lambda batch: size):
        rollout = _responses(policy, reward, prompts, numbers[start : start + size], start, config, adapters)
        slopes = _Slopes(policy, reward, rollout, settings, adapters)
        for drawn, probability in (("policy", slopes.probability), ("top_k", slopes.probability > 0)):
            pairs = slopes.draw(probability, swaps, generator)
            if pairs is None:
                continue
            found[drawn].append(slopes.swapped(pairs, start, 1.0, config.evaluation.batch_size))
            if drawn == "policy":
                found["half-way"].append(slopes.swapped(pairs, start, 0.5, config.evaluation.batch_size))
    if not found["policy"]:
        raise GradeError(
            "no token of these responses has another candidate: there is nothing to swap. Raise generation.top_k or "
            "generation.max_new_tokens."
        )
    rows = [row for drawn, parts in found.items() for row in agreements(drawn, _joined(parts))]
    left_out = [term.name for term in terms if not term.reward.differentiable]
    apart = f" Left out, as without a gradient: {', '.join(left_out)}." if left_out else ""
    return GradientCheck(rows, verdict(rows) + apart, responses, reward.raises)


def _responses(
    policy: Policy,
    reward: Reward,
    prompts: Sequence[list[int]],
    numbers: list[int],
    first: int,
    config: Config,
    adapters: bool,
) -> Rollout:
    """One response to each of the prompts with these numbers; `first` is the number of the first of them. Functions
    have nothing to say of it."""
    sampling = sampling_of(config.generation)
    ids, mask = pad_prompts([prompts[n] for n in numbers], policy.pad_id, policy.device)
    rows = _FIRST_ROW + torch.arange(first, first + len(numbers), device=policy.device) * sampling.max_new_tokens
    rollout = sample(policy, ids, mask, sampling, seed=config.seed, first_rows=rows, adapters=adapters)
    rollout = rollout.of("policy", numbers)
    functions = len(reward.functions) if isinstance(reward, WeightedReward) else 0
    judged = torch.full((len(rollout), functions), torch.nan, dtype=torch.float64, device=policy.device)
    return replace(rollout, judged=judged) if functions else rollout


class _Pairs(NamedTuple):
    """R * each swaps, `each` of every one of R responses together; int64 [R * each] tensors."""

    response: Tensor
    position: Tensor
    candidate: Tensor
    each: int


class _Slopes:
    """The reward of some responses and its gradient at their embeddings.

    Attributes:
        probability: [B, S, k] float32, of what may take a token's place; 0 for the token itself, for what ends the
            response and for what could not be drawn.
    """

    def __init__(self, policy: Policy, reward: Reward, rollout: Rollout, settings: ScoreSettings, adapters: bool):
        self.policy, self.reward, self.rollout = policy, reward, rollout
        self.settings = replace(settings, activation_checkpointing=False)  # of passes without a graph
        done = forward(policy, reward, rollout, settings, grad=True, adapters=adapters)
        frozen, real = done.frozen, done.real
        fed = [*([frozen.fed] if reward.shares_base_pass else []), *frozen.fed_reward]
        if not fed or not frozen.reward.requires_grad:
            raise _no_gradient(f"the value of {type(reward).__name__} depends on no embedding that it is fed")
        at_x = vjp(fed, [frozen.reward], [torch.ones_like(frozen.reward)])
        self.value = frozen.reward.detach()
        self.gradients = [(real.dense(gradient), rows) for gradient, rows in at_x]
        chances = sampled_logits(policy, rollout, real, present(done.swept.logits)).softmax(-1)
        ends = torch.isin(real.indices, policy.eos_ids) | torch.isin(real.tokens, policy.eos_ids)[:, None]
        chances = torch.where(ends | (real.indices == real.tokens[:, None]), 0.0, chances)
        self.probability = real.dense(chances)

    def draw(self, weight: Tensor, count: int, generator: torch.Generator) -> _Pairs | None:
        """`count` pairs of a position and a candidate in every response that has one, by their weights [B, S, k]."""
        response, position, place = drawn_places(weight, count, generator)
        if not len(response):
            return None
        return _Pairs(response, position, self.rollout.indices[response, position, place], count)

    @torch.no_grad()
    def swapped(self, pairs: _Pairs, first: int, share: float, size: int) -> Swaps:
        """The effects of going `share` of the way from a token's embedding to another's.

        Args:
            first: number of the first response.
            size: most sequences in a pass.
        """
        response, position, candidate, each = pairs
        rollout = self.rollout
        before = rollout.tokens[response, position]
        predicted = torch.zeros(len(response), dtype=torch.float64, device=before.device)
        for gradient, rows in self.gradients:
            apart = rows[candidate].double() - rows[before].double()  # [N, d]
            predicted += share * (gradient[response, position].double() * apart).sum(-1)
        parts = self._rollout(pairs, share).micro_batches(size // each * each or size)
        after = [frozen_passes(self.policy, self.reward, p, RealTokens(p), self.settings).reward for p in parts]
        true = torch.cat(after).double() - self.value[response].double()
        third = position * 3 // rollout.mask.sum(1)[response]
        return Swaps(*(x.cpu().numpy() for x in (response + first, third, predicted, true)))

    def _rollout(self, pairs: _Pairs, share: float) -> Rollout:
        """The responses after each swap; what is part of the way is fed as a mixture, as soft GRADE feeds them."""
        response, position, candidate, each = pairs
        rollout, row = self.rollout, torch.arange(len(response), device=response.device)
        tokens = rollout.tokens[response]  # [N, S]
        indices = tokens[..., None].repeat(1, 1, 2)  # [N, S, 2]
        indices[row, position, 1] = candidate
        weights = torch.zeros(indices.shape, dtype=rollout.token_weight.dtype, device=tokens.device)
        weights[..., 0] = 1.0
        weights[row, position] = weights.new_tensor([1 - share, share])
        if share == 1.0:
            tokens[row, position] = candidate
        return replace(
            rollout,
            prompt_ids=rollout.prompt_ids[response],
            prompt_mask=rollout.prompt_mask[response],
            tokens=tokens,
            mask=rollout.mask[response],
            indices=indices,
            token_weight=weights[..., 0],
            rows=rollout.rows[response],
            weights=None if share == 1.0 else weights,
            samples_per_prompt=each,
            prompt_index=None if rollout.prompt_index is None else rollout.prompt_index[response],
            judged=None if rollout.judged is None else rollout.judged[response],
        )


def drawn_places(weight: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """`count` independent draws of a position and a candidate of every response that has one, by their weights.

    The position first, and then the candidate: torch draws among 2^24 at most, and S * k may be more.

    Args:
        weight: [B, S, k], bool or not negative.
        generator: of a CPU.

    Returns:
        (response, position, place among the candidates), int64 [R * count] each, those of a response together.
    """
    of_positions = weight.sum(2, dtype=torch.float64).cpu()  # [B, S]
    some = (of_positions.sum(1) > 0).nonzero().squeeze(1)  # [R]
    if not len(some):
        return some, some, some
    position = torch.multinomial(of_positions[some], count, replacement=True, generator=generator).flatten()
    response, position = (x.to(weight.device) for x in (some.repeat_interleave(count), position))
    chances = weight[response, position].double().cpu()  # [R * count, k]
    place = torch.multinomial(chances, 1, generator=generator).squeeze(1)
    return response, position, place.to(weight.device)


def _joined(parts: list[Swaps]) -> Swaps:
    return Swaps(*(np.concatenate([getattr(p, n) for p in parts]) for n in ("response", "third", "predicted", "true")))


def _no_gradient(reason: str) -> GradeError:
    return GradeError(
        f"the gradient check needs a reward with a gradient at the response's embeddings: {reason}. Follow it with a "
        f"method that only needs its value: {', '.join(BY_VALUE)}."
    )

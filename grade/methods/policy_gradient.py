"""What PPO, REINFORCE and GRPO share: the fixed part of a step's responses, and the differentiable part.

Fixed while the policy moves: the reward, the reference's hidden states (not its logits) and, where a method needs
them, the terms of the policy that sampled. Differentiable: one parallel pass of the policy and one sweep over its head
(`grade_kernels.vocab_objective`), which gives the log-probabilities of the tokens, entropy and both KLs, and keeps
nothing of the vocabulary's size.

Log-probabilities are those of the distribution the tokens were drawn from: the policy's, restricted to the rollout's
candidates. So with the same micro-batches the importance ratio is exactly 1 until the first update. Entropy and KL are
those of the full distribution.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeVar

import torch
from torch import Tensor

from grade.config.methods import micro_batch_size
from grade.errors import present
from grade.methods.base import Method
from grade.methods.metrics import add_sums, step_sums, to_numbers, update_metrics
from grade.model.passes import fed_embeddings, policy_pass
from grade.replay.score import RealTokens, Scores, ScoreSettings, frozen_passes, sampled_logits
from grade.rewards.base import of_users
from grade.rollout import Rollout
from grade.sampling.draw import Sampling, sampling_of
from grade.seeds import derived_seed
from grade_kernels import vocab_objective

T = TypeVar("T")


@dataclass
class Terms:
    """The policy along sampled responses; per-token tensors are [B, S] float32 with 0 at padding, in nats.

    Args:
        logprob: of the tokens, under the distribution they were drawn from. Differentiable.
        penalty: scalar, the sum of entropies and KLs under the `Weights` that were given. Differentiable.
        hidden: [B, S, d], the states that predict the tokens. Differentiable.
        full_logprob, ref_logprob: of the tokens, under the full distributions of policy and reference.
        entropy, kl, ref_kl: exact; kl(policy‖ref) and kl(ref‖policy), the latter None where nothing asks for it.
        mass: share of probability on the candidates.

    Without the reference `ref_logprob`, `kl` and `ref_kl` are None.
    """

    logprob: Tensor
    penalty: Tensor
    hidden: Tensor
    full_logprob: Tensor
    entropy: Tensor
    mass: Tensor
    ref_logprob: Tensor | None
    kl: Tensor | None
    ref_kl: Tensor | None


@dataclass
class Weights:
    """[B, S] weights of each token's entropy, kl(policy‖ref) and kl(ref‖policy) in a loss; None leaves a term out."""

    entropy: Tensor | None = None
    kl: Tensor | None = None
    ref_kl: Tensor | None = None


@dataclass
class Scored:
    """A micro-batch and what is fixed about it while the policy moves.

    Args:
        reward: [B].
        reward_terms: as `Scores.terms`.
        reference: [n, d], the base's hidden states that predict the n real tokens.
        gains: [B, S], what each token added to the reward; None unless asked for.
        sampled: the terms of the policy that sampled, without a graph; None unless asked for.
    """

    rollout: Rollout
    reward: Tensor
    reward_terms: dict[str, Tensor]
    reference: Tensor
    gains: Tensor | None = None
    sampled: Terms | None = None

    @property
    def old(self) -> Terms:
        """`sampled`, for a method that has asked for it."""
        return present(self.sampled)


def clipped_surrogate(
    logprob: Tensor, old_logprob: Tensor, advantage: Tensor, clip_low: float, clip_high: float
) -> Tensor:
    """[B, S]: max(-A ratio, -A clip(ratio, 1 - clip_low, 1 + clip_high)), PPO's pessimistic loss (Schulman 2017)."""
    ratio = torch.exp(logprob - old_logprob)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    return torch.maximum(-advantage * ratio, -advantage * clipped)


def weighted(values: Tensor, rollout: Rollout) -> Tensor:
    """[B, S]: `values` times the tokens' importance weights, where the rollout has any: truncated importance sampling,
    min(pi / pi of the engine, rollout.importance_cap), held fixed (Yao et al. 2025, "Your efficient RL framework
    secretly brings you off-policy RL training")."""
    return values if rollout.importance is None else values * rollout.importance


def mean_of_others(sums: Tensor, tokens: Tensor, total: float, total_tokens: float) -> Tensor:
    """[n] float64: a mean over the tokens of a step's other responses, so that it does not depend on the response.

    Args:
        sums: [n], of each response's tokens; tokens: [n], their number.
        total, total_tokens: of the whole step, over micro-batches and processes.

    0 where a step has no other response.
    """
    others = total_tokens - tokens.double()
    return torch.where(others > 0, (total - sums.double()) / others.clamp_min(1), 0.0)


class PolicyGradient(Method):
    """Base of the three: sampling, scoring and the policy's terms. What they do with them is in their own files."""

    minibatches = 1

    def __post_init__(self) -> None:
        self.reward = self.reward.by_value()
        super().__post_init__()
        responses = self.train.batch_size * self.train.accumulation_steps
        self.micro_batch = self.together = micro_batch_size(self.config, self.train.batch_size, responses)
        self._parts: list[int] = []  # of each micro-batch of the step, where fewer pass together

    def sampling(self, step: int) -> Sampling:
        return sampling_of(self.generation)

    @torch.no_grad()
    def score(self, rollouts: list[Rollout], *, sampled: bool = False, gains: bool = False) -> list[Scored]:
        """Reward and reference of a step's responses, in micro-batches.

        Args:
            sampled: also the terms of the policy as it is now.
            gains: also what each token added to the reward.
        """
        out, settings = [], ScoreSettings(prompt_cache=self.config.prompt_cache, training=True)
        with self.services.phase("score"):
            batches = self._in_parts(self.judged(rollouts))
            parts, each = self.policy.parts_failing_together(self.services.failing_together)
            with parts():
                for rollout in batches:
                    with each():
                        frozen = frozen_passes(self.policy, self.reward, rollout, RealTokens(rollout), settings)
                        scored = Scored(rollout, frozen.reward, frozen.terms, frozen.reference)
                        if gains:
                            with of_users(self.reward):
                                values = self.reward.prefix_values(rollout, frozen.base)
                                scored.gains = values.diff(dim=1) * rollout.mask
                    if sampled:
                        scored.sampled = self.terms(scored)
                    out.append(scored)
        return out

    def same_minibatches(self, drawn: int, before: int) -> bool:
        return self.minibatches == 1 or (drawn % self.micro_batch == 0 and before % self.micro_batch == 0)

    def _in_parts(self, rollouts: list[Rollout]) -> list[Rollout]:
        """Micro-batches or, where fewer responses pass together, their parts; `shuffled_minibatches` keeps these
        together, so that the same responses share a mini-batch."""
        whole = [m for r in rollouts for m in r.micro_batches(self.micro_batch)]
        parts = [[m] if len(m) <= self.together else list(m.micro_batches(self.together)) for m in whole]
        self._parts = [len(part) for part in parts]
        return [part for of_one in parts for part in of_one]

    def terms(self, scored: Scored, weights: Weights | None = None, *, reference: bool = True) -> Terms:
        """The policy as it is now, along a micro-batch; with a graph unless gradients are off.

        Args:
            weights: of `Terms.penalty`.
            reference: also what compares the policy with the reference, for a second product with the head.
        """
        policy, rollout, weights = self.policy, scored.rollout, weights or Weights()
        real = RealTokens(rollout)
        x = fed_embeddings(rollout, policy.embedding, policy.embedding_scale)
        recompute = self.activation_checkpointing and torch.is_grad_enabled()
        hidden = policy_pass(
            policy,
            rollout,
            x,
            # As with a graph, where there is none: the policy that sampled is compared with what it has become.
            prompt_cache=self.config.prompt_cache and not self.activation_checkpointing,
            activation_checkpointing=recompute,
            compiled=True,
        )

        def rows(weight: Tensor | None) -> Tensor | None:
            return None if weight is None else real.rows(weight)

        def dense(values: Tensor | None) -> Tensor | None:
            return None if values is None else real.dense(values)

        head = vocab_objective(
            real.rows(hidden),
            policy.head,
            indices=real.indices,
            tokens=real.tokens,
            ref_hidden=scored.reference if reference else None,
            ref_kl=self.config.kl_direction == "ref_policy",
            entropy_weight=rows(weights.entropy),
            kl_weight=rows(weights.kl),
            ref_kl_weight=rows(weights.ref_kl),
            chunk_bytes=self.config.head_chunk_bytes(self.policy.device.type),
        )
        chosen = (head.indices == real.tokens[:, None]).long().argmax(1, keepdim=True)
        logprob = sampled_logits(policy, rollout, real, head.logits).log_softmax(-1).gather(1, chosen).squeeze(1)
        return Terms(
            real.dense(logprob),
            logprob.new_zeros(()) if head.objective is None else head.objective.sum(),
            hidden,
            full_logprob=real.dense(present(head.logprob)),
            entropy=real.dense(head.entropy),
            mass=real.dense(head.mass),
            ref_logprob=dense(head.ref_logprob),
            kl=dense(head.kl),
            ref_kl=dense(head.ref_kl),
        )

    def in_direction(self, weight: Tensor) -> Weights:
        """The weight [B, S] for the KL in the direction of the settings."""
        return Weights(kl=weight) if self.config.kl_direction == "policy_ref" else Weights(ref_kl=weight)

    def kl_of(self, terms: Terms) -> Tensor:
        """[B, S], KL in the direction of the settings."""
        return present(terms.kl if self.config.kl_direction == "policy_ref" else terms.ref_kl)

    def others_kl(self, scored: list[Scored]) -> list[Tensor]:
        """[B, 1] float64 per micro-batch: what a token's KL is compared with, nats; needs `Scored.sampled`.

        With `kl_reduction: token_mean` the step's KL is a ratio of sums, KL / tokens. Minus the same ratio without the
        response, which its tokens do not change, a response with the KL k in n tokens is charged for
        (k - n * mean of the others) / tokens: without bias for responses of any lengths, and length as such costs
        nothing. 0 for a sum over responses, to which every token adds.
        """
        sizes = [len(s.reward) for s in scored]
        if self.config.kl_reduction == "sequence_sum":
            mean = torch.zeros(sum(sizes), dtype=torch.float64, device=scored[0].reward.device)
        else:
            sums = torch.cat([self.kl_of(s.old).double().sum(1) for s in scored])
            tokens = torch.cat([s.rollout.mask.sum(1) for s in scored])
            total = self.services.sum({"kl": sums.sum().item(), "tokens": tokens.sum().item()})
            mean = mean_of_others(sums, tokens, total["kl"], total["tokens"])
        return list(mean[:, None].split(sizes))

    def shuffled_minibatches(self, batch: Sequence[T], step: int, epoch: int) -> Iterator[list[T]]:
        """`minibatches` lists of micro-batches in an order that follows from (seed, step, epoch).

        Args:
            batch: one for each that `score` gave.
        """
        parts, ends = self._parts, list(accumulate(self._parts))
        generator = torch.Generator().manual_seed(derived_seed(self.seed, step, epoch))
        order = torch.randperm(len(parts), generator=generator).tolist()
        for i in range(self.minibatches):
            start, stop = (n * len(order) // self.minibatches for n in (i, i + 1))
            yield [part for j in order[start:stop] for part in batch[ends[j] - parts[j] : ends[j]]]

    def sums(self, scored: Scored, terms: Terms, **per_response: Tensor) -> dict[str, float]:
        """A micro-batch's contribution to the metrics that every method logs, and its own."""
        kl = self.kl_of(terms)
        own = scored.reward_terms
        values = Scores(scored.reward, kl, terms.entropy, terms.full_logprob, terms.mass, terms=own)
        return step_sums(scored.rollout, values, self.policy.eos_ids, per_response=per_response)

    def metrics(
        self, sums: dict[str, float], norms: list[float], own: dict[str, float] | None = None
    ) -> dict[str, float]:
        """A step's metrics from the sums above, the `norms` of its updates, and its `own`, by the names of TRL where it
        has one.

        `objective/kl` is the KL of a response, exact where TRL's is sampled.
        """
        metrics = self.observed(sums)
        return {
            "loss": self.loss(metrics),
            **metrics,
            "objective/kl": metrics["kl_sequence"],
            **(own or {}),
            **update_metrics(norms),
        }


class TokenMeans:
    """Means over the real tokens of every pass of a step, over processes: importance ratios, clipping."""

    def __init__(self, sum_over_processes: Callable[[dict[str, float]], dict[str, float]]):
        self._sum = sum_over_processes
        self.sums: dict[str, float] = {}

    def add(self, mask: Tensor, **values: Tensor) -> None:
        """Add a pass; `values` are [B, S], entries at padding are ignored."""
        part = {"tokens": mask.sum(), **{name: (v.detach() * mask).sum() for name, v in values.items()}}
        self.sums = add_sums(self.sums, to_numbers(part))

    def take(self) -> dict[str, float]:
        """The means so far by name, none if no token was added; starts again.

        Every process must have added the same names, be it under an empty mask.
        """
        total, self.sums = self._sum(self.sums), {}
        count = total.pop("tokens")
        return {name: value / count for name, value in total.items()} if count else {}

"""REINFORCE on whole responses (Williams 1992), with a moving-average or a leave-one-out baseline.

    grad L = - mean over responses of (R - b) * grad log pi(Y)  +  grad of kl_coef * KL at fixed responses
    R      = r(Y) - what the response adds to kl_coef * KL

With log pi(Y) the sum over tokens. The first term is the effect of choosing other tokens, on the reward and on the KL
that they lead to; the second the effect on the KL of each visited state. KL is exact, so only the choice of tokens is
sampled, and together they are the gradient of the objective that GRADE also minimises. Without bias for the KL summed
over responses and for responses of one length. The mean over the tokens of a step is a ratio of two sums: a response
is compared with the mean of the step's others, which is without bias for any lengths, where their KL is known before
the first backward pass: with the leave-one-out baseline, and in the first step. Later steps of the other baselines
spare that pass and take the mean of earlier steps, which follows the ratio to first order. Departures from the
textbook: the distribution is restricted to the sampler's candidates, and AdamW takes the step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grade.methods.base import Update
from grade.methods.metrics import add_sums
from grade.methods.policy_gradient import PolicyGradient, Scored, weighted
from grade.methods.services import Totals
from grade.rollout import Rollout


def reinforce_loss(logprob: Tensor, advantage: Tensor) -> Tensor:
    """Sum over responses of - advantage * log-probability.

    Args:
        logprob: [B, S] nats per token, 0 at padding.
        advantage: [B], without a gradient.
    """
    return -(advantage * logprob.sum(1)).sum()


def penalised_return(
    reward: Tensor, kl: Tensor, weight: Tensor, responses: int, mean_kl: float | Tensor = 0.0
) -> Tensor:
    """[B] float64: reward minus what the response adds to the KL term, on the scale of one reward.

    Args:
        reward: [B]; kl: [B, S] nats; weight: [B, S], of each token's KL in the loss.
        responses: of the whole step, by whose number the loss divides rewards.
        mean_kl: number or [B, 1], KL per token of other responses, where the loss takes the mean over tokens: a token
            raises a mean only by what it has above it, so that length as such costs nothing. 0 for a sum.
    """
    return reward.double() - responses * (weight * (kl - mean_kl)).sum(1)


def leave_one_out(returns: Tensor) -> Tensor:
    """[..., N] -> [..., N], the mean of the other N - 1 entries (Kool et al. 2019)."""
    return (returns.sum(-1, keepdim=True) - returns) / (returns.shape[-1] - 1)


class MovingAverage:
    """Average of past returns that forgets with `decay`; corrected for its start at 0, as Adam's moments are."""

    def __init__(self, decay: float):
        self.decay, self.total, self.weight = decay, 0.0, 0.0

    @property
    def value(self) -> float | None:
        """None before the first update."""
        return self.total / self.weight if self.weight else None

    def update(self, mean: float) -> None:
        self.total = self.decay * self.total + (1 - self.decay) * mean
        self.weight = self.decay * self.weight + (1 - self.decay)

    def state_dict(self) -> dict[str, float]:
        return {"total": self.total, "weight": self.weight}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.total, self.weight = state["total"], state["weight"]


class Reinforce(PolicyGradient):
    """The method as the trainer sees it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.settings = self.config.reinforce
        self.average = MovingAverage(self.settings.ema_decay)
        self.average_kl = MovingAverage(self.settings.ema_decay)  # nats per token

    def step(self, rollouts: list[Rollout], step: int, update: Update) -> dict[str, float]:
        config, totals = self.config, self.services.totals(r.mask for r in rollouts)
        # The KL is known before the backward pass where other responses' is asked for: see the top of this file.
        first = self.average_kl.value is None and self.kl_coef > 0 and config.kl_reduction == "token_mean"
        known = self.settings.baseline == "leave_one_out" or (first and totals.responses > 1)
        scored = self.score(rollouts, sampled=known)
        mean_kl = self._mean_kl(scored)
        baselines = self._baselines(scored, mean_kl, totals)
        sums: dict[str, float] = {}
        with self.services.phase("backward"):
            for s, mean, baseline in zip(scored, mean_kl, baselines, strict=True):
                weight = self.weight_of_kl(s.rollout.mask, totals)
                terms = self.terms(s, self.in_direction(weight))
                returns = penalised_return(s.reward, self.kl_of(terms), weight, totals.responses, mean)
                advantage = (returns - baseline).to(terms.logprob.dtype)
                chosen = weighted(terms.logprob, s.rollout)
                (reinforce_loss(chosen, advantage) / totals.responses + terms.penalty).backward()
                own = {"return": returns, "baseline": baseline, "advantage²": advantage.square()}
                sums = add_sums(sums, self.sums(s, terms, **own))
        self.services.before_update(sums)
        metrics = self.metrics(sums, [update()])
        self.average.update(metrics["return"])
        self.average_kl.update(metrics["kl"])
        return metrics

    def _mean_kl(self, scored: list[Scored]) -> list[Tensor]:
        """[B, 1] float64 per micro-batch: what a token's KL is compared with; never its own response's."""
        if scored[0].sampled is not None:
            return self.others_kl(scored)
        past = 0.0 if self.config.kl_reduction == "sequence_sum" else self.average_kl.value or 0.0
        return [s.reward.new_full((len(s.reward), 1), past, dtype=torch.float64) for s in scored]

    def _baselines(self, scored: list[Scored], mean_kl: list[Tensor], totals: Totals) -> list[Tensor]:
        """[B] float64 per micro-batch: what each response's return is compared with; never its own."""
        sizes = [len(s.reward) for s in scored]
        first = self.settings.baseline == "ema" and self.average.value is None  # has no past, so others serve
        if self.settings.baseline == "leave_one_out" or (first and totals.responses > 1):
            baseline = self._return_of_others(scored, torch.cat(mean_kl).squeeze(1), totals)
        else:
            past = self.average.value or 0.0 if self.settings.baseline == "ema" else 0.0
            baseline = torch.full((sum(sizes),), past, dtype=torch.float64, device=scored[0].reward.device)
        return list(baseline.split(sizes))

    def _return_of_others(self, scored: list[Scored], mean_kl: Tensor, totals: Totals) -> Tensor:
        """[n] float64: mean return of the other responses as it would be without the response, nowhere in which it is:
        their rewards minus their part of the KL of a step that had only the others.

        Without `Scored.sampled` only of their rewards, which is no bias either.
        """
        baseline = self._mean_of_others(torch.cat([s.reward.double() for s in scored]), totals.responses)
        if scored[0].sampled is None:
            return baseline
        kl = torch.cat([self.kl_of(s.old).double().sum(1) for s in scored])
        tokens = torch.cat([s.rollout.mask.sum(1).double() for s in scored])
        kl, length = (self._mean_of_others(x, totals.responses) for x in (kl, tokens))
        # From a sum of KL over a response to its part of the loss, on the scale of one reward.
        token_mean = self.config.kl_reduction == "token_mean"
        scale = (totals.responses - 1) / (totals.tokens - tokens) if token_mean else torch.ones_like(tokens)
        return baseline - self.kl_coef * scale * (kl - length * mean_kl)

    def _mean_of_others(self, values: Tensor, responses: int) -> Tensor:
        """[n] -> [n]: over the samples of a prompt, or where there is one each, over the step's responses on all
        processes; without the response itself."""
        copies = self.generation.samples_per_prompt
        if copies > 1:
            return leave_one_out(values.view(-1, copies)).flatten()
        total = self.services.sum({"value": values.sum().item()})["value"]
        return (total - values) / (responses - 1)

    def state_dict(self) -> dict:
        return {"average": self.average.state_dict(), "average_kl": self.average_kl.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.average.load_state_dict(state["average"])
        self.average_kl.load_state_dict(state["average_kl"])

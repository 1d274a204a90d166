"""REINFORCE on whole responses (Williams 1992), with a moving-average or a leave-one-out baseline.

    grad L = - mean over responses of (R - b) * grad log pi(Y)  +  grad of kl_coef * KL at fixed responses
    R      = r(Y) - what the response adds to kl_coef * KL

With log pi(Y) the sum over tokens. The first term is the effect of choosing other tokens, on the reward and on the KL
that they lead to; the second the effect on the KL of each visited state. KL is exact, so only the choice of tokens is
sampled, and together they are the gradient of the objective that GRADE also minimises. Without bias for the KL summed
over responses and for responses of one length; the mean over the tokens of a step is a ratio of two sums, and is
followed to first order. Departures from the textbook: the distribution is restricted to the sampler's candidates, and
AdamW takes the step.
"""

from __future__ import annotations

from typing import Dict, List, Optional

import torch
from torch import Tensor

from grade.methods import Update, kl_weight
from grade.metrics import add_sums
from grade.policy_gradient import PolicyGradient, Scored
from grade.rollout import Rollout


def reinforce_loss(logprob: Tensor, advantage: Tensor) -> Tensor:
    """Sum over responses of - advantage * log-probability.

    Args:
        logprob: [B, S] nats per token, 0 at padding.
        advantage: [B], without a gradient.
    """
    return -(advantage * logprob.sum(1)).sum()


def penalised_return(
    reward: Tensor, kl: Tensor, weight: Tensor, responses: int, mean_kl: float = 0.0
) -> Tensor:
    """[B] float64: reward minus what the response adds to the KL term, on the scale of one reward.

    Args:
        reward: [B]; kl: [B, S] nats; weight: [B, S], what each token's KL counts in the loss.
        responses: of the whole step, by whose number the loss divides rewards.
        mean_kl: KL per token of the other responses, where the loss takes the mean over tokens: a token raises a mean
            only by what it has above it, so that length as such costs nothing. 0 for a sum.
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
    def value(self) -> Optional[float]:
        """None before the first update."""
        return self.total / self.weight if self.weight else None

    def update(self, mean: float) -> None:
        self.total = self.decay * self.total + (1 - self.decay) * mean
        self.weight = self.decay * self.weight + (1 - self.decay)

    def state_dict(self) -> Dict[str, float]:
        return {"total": self.total, "weight": self.weight}

    def load_state_dict(self, state: Dict[str, float]) -> None:
        self.total, self.weight = state["total"], state["weight"]


class Reinforce(PolicyGradient):
    """The method as the trainer sees it."""

    def __init__(self, policy, reward, config, services):
        super().__init__(policy, reward, config, services)
        self.settings = config.method.reinforce
        self.average = MovingAverage(self.settings.ema_decay)
        self.average_kl = MovingAverage(self.settings.ema_decay)  # nats per token

    def step(self, rollouts: List[Rollout], step: int, update: Update) -> Dict[str, float]:
        method, totals = self.config.method, self.services.totals(r.mask for r in rollouts)
        scored = self.score(rollouts, old=self.settings.baseline == "leave_one_out")
        weights = [
            kl_weight(s.rollout.mask, method.kl_reduction, method.kl_coef, totals.tokens, totals.responses)
            for s in scored
        ]
        baselines = self._baselines(scored, weights, totals.responses)
        sums: Dict[str, float] = {}
        with self.services.phase("backward"):
            for s, weight, baseline in zip(scored, weights, baselines, strict=True):
                terms = self.terms(s, **self.kl_weights(weight))
                returns = penalised_return(s.reward, self.kl_of(terms), weight, totals.responses, self._mean_kl)
                advantage = (returns - baseline).to(terms.logprob.dtype)
                (reinforce_loss(terms.logprob, advantage) / totals.responses + terms.penalty).backward()
                own = {"return": returns, "baseline": baseline, "advantage²": advantage.square()}
                sums = add_sums(sums, self.sums(s, terms, **own))
        update()
        metrics = self.metrics(sums, {})
        self.average.update(metrics["return"])
        self.average_kl.update(metrics["kl"])
        return metrics

    @property
    def _mean_kl(self) -> float:
        """Of earlier steps, so that it does not depend on the responses it is used for."""
        return 0.0 if self.config.method.kl_reduction == "sequence_sum" else self.average_kl.value or 0.0

    def _baselines(self, scored: List[Scored], weights: List[Tensor], responses: int) -> List[Tensor]:
        """[B] float64 per micro-batch: what each response's return is compared with; never its own."""
        rewards = torch.cat([s.reward.double() for s in scored])
        if self.settings.baseline == "none":
            baseline = torch.zeros_like(rewards)
        elif self.settings.baseline == "leave_one_out":
            returns = [
                penalised_return(s.reward, self.kl_of(s.old), w, responses, self._mean_kl)
                for s, w in zip(scored, weights, strict=True)
            ]
            baseline = self._leave_one_out(torch.cat(returns), responses)
        elif self.average.value is not None:
            baseline = torch.full_like(rewards, self.average.value)
        elif responses > 1:  # the first step has no past; others' rewards serve, the KL is still near 0
            baseline = self._leave_one_out(rewards, responses)
        else:
            baseline = torch.zeros_like(rewards)
        return list(baseline.split([len(s.reward) for s in scored]))

    def _leave_one_out(self, returns: Tensor, responses: int) -> Tensor:
        """Over the samples of a prompt, or where there is one each, over the step's responses on all processes."""
        copies = self.config.generation.samples_per_prompt
        if copies > 1:
            return leave_one_out(returns.view(-1, copies)).flatten()
        total = self.services.sum({"return": returns.sum().item()})["return"]
        return (total - returns) / (responses - 1)

    def state_dict(self) -> dict:
        return {"average": self.average.state_dict(), "average_kl": self.average_kl.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.average.load_state_dict(state["average"])
        self.average_kl.load_state_dict(state["average_kl"])

"""The little that all methods share: the loss, and what the trainer asks of them.

Every method minimises the same

    L = - mean over responses of the reward  +  kl_coef * KL(policy, reference)

on the same rollouts, with the same reference and reward; they differ in how they turn a step's responses into updates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from grade.config import GenerationConfig, MethodConfig, TrainConfig
from grade.config.bounds import WEIGHT
from grade.methods.metrics import moments, step_metrics
from grade.methods.services import Services, Totals
from grade.model.policy import Policy
from grade.rewards.base import Reward
from grade.rewards.silence import Silence
from grade.rollout import Rollout
from grade.sampling.draw import Sampling

Update = Callable[[], float]
"""Takes one optimizer step with the gradients accumulated so far, over all processes, and clears them; the norm of the
policy's gradient before it was clipped."""


@dataclass(eq=False)
class Method:
    """What the trainer asks of a method; one that keeps nothing between steps need only sample and step.

    Attributes:
        kl_coef: weight of the KL per nat, which moves where the settings have a target for the KL.
        together: responses that pass through the policy together, at first as many as the settings say; what a step
            gives depends on it by rounding alone.
        repeatable: whether a step that was stopped before its first update may be tried again with fewer together.

    Args:
        seed: of the run; the order of mini-batches and the masks of dropout follow from it.
        activation_checkpointing: whether activations are recomputed in the backward passes, as the run has decided.
    """

    policy: Policy
    reward: Reward
    config: MethodConfig
    generation: GenerationConfig
    train: TrainConfig
    services: Services
    seed: int
    activation_checkpointing: bool

    def __post_init__(self) -> None:
        self.silence = Silence(self.reward)
        self.together, self.repeatable = self.train.batch_size, True
        self.kl_coef = self.config.kl_coef
        if self.activation_checkpointing:
            self.policy.enable_activation_checkpointing()

    def sampling(self, step: int) -> Sampling:
        """How responses of a step are drawn."""
        raise NotImplementedError

    def step(self, rollouts: list[Rollout], step: int, update: Update) -> dict[str, float]:
        """Learn from a step's responses on this process, calling `update` for each optimizer step.

        Returns:
            All that is logged of it, but for what the trainer measures itself (times, memory, the learning rate).
        """
        raise NotImplementedError

    def judged(self, rollouts: list[Rollout]) -> list[Rollout]:
        """The rollouts with what a method needs of the reward before it scores them; as `asked`."""
        return self.asked(rollouts)

    def asked(self, rollouts: list[Rollout]) -> list[Rollout]:
        """The rollouts with what the reward's functions say of them, which are asked once a step: of a rollout that
        they have judged they are not asked again.

        Raises:
            RewardFailed: a function of the reward fails, or they have applied to nothing for several steps.
        """
        with self.services.failing_together():
            found = [r if r.judged is not None else replace(r, judged=self.reward.judge(r)) for r in rollouts]
        said = [
            new.judged for new, old in zip(found, rollouts, strict=True) if new is not old and new.judged is not None
        ]
        if said:
            applied = (~torch.cat(said).isnan()).sum(0).tolist()
            self.silence.hear(self.services.sum(dict(zip(self.reward.judges(), applied, strict=True))))
        return found

    def same_minibatches(self, drawn: int, before: int) -> bool:
        """Whether the same responses share a mini-batch where `drawn` of them are sampled together, not `before`."""
        return True

    def observed(self, sums: dict[str, float]) -> dict[str, float]:
        """A step's means from this process' sums; the reward hears what its terms gave."""
        total = self.services.sum(sums)
        self.reward.observe(moments(total))
        return step_metrics(total)

    def weight_of_kl(self, mask: Tensor, totals: Totals) -> Tensor:
        """`kl_weight` under this method's settings, for a step or mini-batch with `totals`."""
        return kl_weight(mask, self.config.kl_reduction, self.kl_coef, totals.tokens, totals.responses)

    def loss(self, metrics: dict[str, float]) -> float:
        """The loss above from a step's means, with the coefficient of this step. Minus it is the objective that studies
        compare methods by, but where `method.target_kl` moves the coefficient: they keep that of the settings."""
        return -metrics["reward"] + self.kl_coef * self._kl_in_loss(metrics)

    def steer(self, metrics: dict[str, float]) -> dict[str, float]:
        """Move `kl_coef` so that the KL comes to the target of the settings, by what a step has seen of it; the
        coefficient of that step as a metric, or nothing without a target."""
        used, target = self.kl_coef, self.config.target_kl
        if target is None:
            return {}
        self.kl_coef = steered(used, self._kl_in_loss(metrics), target, self.config.target_kl_rate)
        return {"kl_coef": used}

    def _kl_in_loss(self, metrics: dict[str, float]) -> float:
        return metrics["kl"] if self.config.kl_reduction == "token_mean" else metrics["kl_sequence"]

    def parameter_groups(self) -> list[dict]:
        """Trainable parameters besides the policy's, as torch.optim takes them."""
        return []

    def state_dict(self) -> dict:
        """What a resumed run needs beside the policy and the optimizer."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Continue from `state_dict`."""


def kl_weight(mask: Tensor, reduction: str, kl_coef: float, total_tokens: int, total_responses: int) -> Tensor:
    """[B, S] float64: the weight of each token's KL in the loss.

    Args:
        mask: [B, S] bool, real tokens.
        reduction: "token_mean" divides by all real tokens of the step, "sequence_sum" by its responses.
        total_tokens, total_responses: of the whole step, over micro-batches and processes.
    """
    total = total_tokens if reduction == "token_mean" else total_responses
    return mask.double() * (kl_coef / total)


_LEAST_COEF = 1e-9  # a target out of reach must not make a weight that no factor brings back


def steered(kl_coef: float, kl: float, target: float, rate: float) -> float:
    """The coefficient after a step with the KL `kl`: times 1 + rate * the relative excess over the target, which counts
    for a fifth at most either way (Ziegler et al. 2019, arXiv 1909.08593, section 2.2)."""
    excess = min(max(kl / target - 1, -0.2), 0.2)
    return min(max(kl_coef * (1 + rate * excess), _LEAST_COEF), WEIGHT)

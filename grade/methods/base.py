"""The methods, one readable file each, and the little they all share: the objective and what the trainer asks of them.

Every method minimises the same

    L = - mean over responses of the reward  +  kl_coef * KL(policy, reference)

on the same rollouts, with the same reference and reward; they differ in how they turn a step's responses into updates.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from grade.config import Config
from grade.config.methods import MethodConfig
from grade.methods.services import Services
from grade.rollout import Rollout
from grade.sampling.draw import Sampling

Update = Callable[[], None]
"""Takes one optimizer step with the gradients accumulated so far, over all processes, and clears them."""


class Method:
    """What the trainer asks of a method; one that keeps nothing between steps need only sample and step."""

    def __init__(self, policy, reward, config: Config, services: Services):
        self.policy, self.reward, self.config, self.services = policy, reward, config, services
        if config.method.checkpoint:
            policy.enable_activation_checkpointing()

    def sampling(self, step: int) -> Sampling:
        """How responses of a step are drawn."""
        raise NotImplementedError

    def step(self, rollouts: list[Rollout], step: int, update: Update) -> dict[str, float]:
        """Learn from a step's responses on this process, calling `update` for each optimizer step; its metrics."""
        raise NotImplementedError

    def parameter_groups(self) -> list[dict]:
        """Trainable parameters besides the policy's, as torch.optim takes them."""
        return []

    def state_dict(self) -> dict:
        """What a resumed run needs beside the policy and the optimizer."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Continue from `state_dict`."""


def kl_weight(mask: Tensor, reduction: str, kl_coef: float, total_tokens: int, total_responses: int) -> Tensor:
    """[B, S] float64: what each token's KL counts in the loss.

    Args:
        mask: [B, S] bool, real tokens.
        reduction: "token_mean" divides by all real tokens of the step, "sequence_sum" by its responses.
        total_tokens, total_responses: of the whole step, over micro-batches and processes.
    """
    total = total_tokens if reduction == "token_mean" else total_responses
    return mask.double() * (kl_coef / total)


def objective(method: MethodConfig, metrics: dict[str, float]) -> float:
    """The loss above from a step's means."""
    kl = metrics["kl"] if method.kl_reduction == "token_mean" else metrics["kl_sequence"]
    return -metrics["reward"] + method.kl_coef * kl

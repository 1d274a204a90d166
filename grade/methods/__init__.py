"""The methods, one readable file each, and which one a name means."""

from __future__ import annotations

from grade.config import GenerationConfig, MethodConfig, TrainConfig
from grade.methods.base import Method
from grade.methods.grade import Grade
from grade.methods.grpo import GRPO
from grade.methods.ppo import PPO
from grade.methods.reinforce import Reinforce
from grade.methods.services import Services
from grade.model.policy import Policy
from grade.rewards.base import Reward

_METHODS: dict[str, type[Method]] = {
    "grade-ste": Grade,
    "grade": Grade,
    "ppo": PPO,
    "reinforce": Reinforce,
    "grpo": GRPO,
}


def make_method(
    policy: Policy,
    reward: Reward,
    config: MethodConfig,
    generation: GenerationConfig,
    train: TrainConfig,
    services: Services,
    *,
    seed: int,
    activation_checkpointing: bool,
) -> Method:
    """The method that method.name names; see `Method` for the arguments."""
    return _METHODS[config.name](policy, reward, config, generation, train, services, seed, activation_checkpointing)

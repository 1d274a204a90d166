"""The methods, one readable file each, and which one a config names."""

from __future__ import annotations

from grade.config import Config
from grade.config.methods import DIFFERENTIATING
from grade.methods.base import Method
from grade.methods.grade import Grade
from grade.methods.grpo import GRPO
from grade.methods.ppo import PPO
from grade.methods.reinforce import Reinforce
from grade.methods.services import Services


def make_method(policy, reward, config: Config, services: Services) -> Method:
    """The method that method.name names."""
    policy_gradients = {"ppo": PPO, "reinforce": Reinforce, "grpo": GRPO}
    method = Grade if config.method.name in DIFFERENTIATING else policy_gradients[config.method.name]
    return method(policy, reward, config, services)

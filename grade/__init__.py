"""GRADE: align a language model by backpropagating a reward through its own generated tokens.

The command line is `grade` or `python -m grade`; `GradeTrainer` is the same for programs (docs/library.md). Importing
this package loads nothing else, so that `grade --help` is quick: what it offers is loaded when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grade.config import Config as GradeConfig
    from grade.config import (
        EvaluationConfig,
        GenerationConfig,
        GuardConfig,
        LoraSettings,
        MethodConfig,
        ModelConfig,
        RewardConfig,
        RolloutConfig,
        TaskConfig,
        TokenizerConfig,
        TrainConfig,
    )
    from grade.config.reading import load_config
    from grade.errors import GradeError
    from grade.rewards.base import DifferentiableReward, EmbeddingTable, Reward, RewardFunction
    from grade.rewards.reward_model import RewardModel
    from grade.rewards.weighted import Term
    from grade.training.api import GradeTrainer, TrainResult
    from grade.training.callbacks import Callback

__version__ = "0.1.0"

__all__ = [
    "Callback",
    "DifferentiableReward",
    "EmbeddingTable",
    "EvaluationConfig",
    "GenerationConfig",
    "GradeConfig",
    "GradeError",
    "GradeTrainer",
    "GuardConfig",
    "LoraSettings",
    "MethodConfig",
    "ModelConfig",
    "Reward",
    "RewardConfig",
    "RewardFunction",
    "RewardModel",
    "RolloutConfig",
    "TaskConfig",
    "Term",
    "TokenizerConfig",
    "TrainConfig",
    "TrainResult",
    "load_config",
]

_ELSEWHERE = {
    "Callback": "grade.training.callbacks",
    "GradeError": "grade.errors",
    "load_config": "grade.config.reading",
    "RewardModel": "grade.rewards.reward_model",
    "Term": "grade.rewards.weighted",
    **dict.fromkeys(("DifferentiableReward", "EmbeddingTable", "Reward", "RewardFunction"), "grade.rewards.base"),
    **dict.fromkeys(("GradeTrainer", "TrainResult"), "grade.training.api"),
}
"""Where a name is; the others are sections of the settings."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(_ELSEWHERE.get(name, "grade.config"))
    value = globals()[name] = getattr(module, "Config" if name == "GradeConfig" else name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

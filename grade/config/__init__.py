"""Settings: their declaration with bounds and meaning, and how they are read from YAML and the command line."""

from grade.config.methods import MethodConfig
from grade.config.schema import (
    NOISE_ROWS,
    Config,
    EvaluationConfig,
    FunctionTerm,
    GenerationConfig,
    LoraSettings,
    ModelConfig,
    RewardConfig,
    RolloutConfig,
    TrainConfig,
    default_methods,
    flatten,
    get_setting,
    judged_length,
    settings_with_role,
    trains_head,
    validate,
    without_gradient,
)
from grade.config.tasks import TaskConfig, TokenizerConfig

__all__ = [
    "NOISE_ROWS",
    "Config",
    "EvaluationConfig",
    "FunctionTerm",
    "GenerationConfig",
    "LoraSettings",
    "MethodConfig",
    "ModelConfig",
    "RewardConfig",
    "RolloutConfig",
    "TaskConfig",
    "TokenizerConfig",
    "TrainConfig",
    "default_methods",
    "flatten",
    "get_setting",
    "judged_length",
    "settings_with_role",
    "trains_head",
    "validate",
    "without_gradient",
]

"""Settings: their declaration with bounds and meaning, and how they are read from YAML and the command line."""

from grade.config.guard import GuardConfig
from grade.config.methods import MethodConfig
from grade.config.model import LoraSettings, ModelConfig
from grade.config.reward import FunctionTerm, RewardConfig, trains_head, trains_proxy, without_gradient
from grade.config.sampling import GenerationConfig, RolloutConfig
from grade.config.schema import Config, default_methods, flatten, get_setting, judged_length, settings_with_role
from grade.config.tasks import TaskConfig, TokenizerConfig
from grade.config.training import EvaluationConfig, TrainConfig
from grade.config.validation import NOISE_ROWS, validate

__all__ = [
    "NOISE_ROWS",
    "Config",
    "EvaluationConfig",
    "FunctionTerm",
    "GenerationConfig",
    "GuardConfig",
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
    "trains_proxy",
    "validate",
    "without_gradient",
]

"""The settings of a run as one typed dataclass of sections, and what is asked of it as a whole.

The command line (`grade.cli`) builds its options, its help and its YAML keys from these classes, so a field's
docstring is what `grade train --help` prints. Nothing heavy is imported: `--help` must be quick.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_origin

from grade.config.bounds import SEED, Role, facts_of, setting
from grade.config.guard import GuardConfig
from grade.config.methods import BY_VALUE, METHODS, MethodConfig
from grade.config.model import ModelConfig
from grade.config.reward import RewardConfig, without_gradient
from grade.config.sampling import GenerationConfig, RolloutConfig
from grade.config.studies import CompareConfig, VarianceConfig
from grade.config.tasks import JUDGED_BY_PROGRAM, TaskConfig, TokenizerConfig
from grade.config.training import EvaluationConfig, TrainConfig


@dataclass
class Config:
    """Everything a run depends on."""

    name: str = setting("grade", text="name", role="place")
    """Name of the experiment: the first part of its folder names."""
    seed: int = setting(0, ge=0, le=SEED)
    """Seed of adapter initialisation, prompt order and sampling noise."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: the accelerator where there is one."""
    output_dir: str = setting("runs", text="path", role="place")
    """Folder for run directories and trained reward heads."""
    task: TaskConfig = field(default_factory=TaskConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    guard: GuardConfig = setting(default_factory=GuardConfig, role="resume")
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    compare: CompareConfig = setting(default_factory=CompareConfig, role="resume")
    variance: VarianceConfig = setting(default_factory=VarianceConfig, role="resume")

    @property
    def run_dir(self) -> str:
        return self.train.run_dir or f"{self.output_dir}/{self.name}-seed{self.seed}"


_DICTS = frozenset(name for name, kind, _ in facts_of(Config) if get_origin(kind) is dict)
"""Settings whose values are dicts."""


def settings_with_role(*roles: Role) -> list[str]:
    """Dotted names of the settings that play one of these roles."""
    return [name for name, _, facts in facts_of(Config) if facts.role in roles]


def get_setting(config: Config, dotted: str) -> Any:
    """The value of `section.name` in `config`."""
    value: Any = config
    for part in dotted.split("."):
        value = getattr(value, part)
    return value


def flatten(settings: dict, prefix: str = "") -> dict[str, object]:
    """{"train": {"steps": 1}} -> {"train.steps": 1}; a setting that is itself a dict stays one."""
    flat: dict[str, object] = {}
    for name, value in settings.items():
        inner = isinstance(value, dict) and prefix + name not in _DICTS
        flat.update(flatten(value, f"{prefix}{name}.") if inner else {prefix + name: value})
    return flat


def default_methods(config: Config) -> list[str]:
    """What `grade compare` compares unless told: the methods that can use the task's reward."""
    methods = METHODS if without_gradient(config.task, config.reward) is None else BY_VALUE
    by_program = config.task.name in JUDGED_BY_PROGRAM and not config.reward.terms
    return [*methods, *(["grpo-token"] if by_program else [])]


def judged_length(task: TaskConfig, reward: RewardConfig, generation: GenerationConfig) -> int:
    """Tokens of the text that the reward will judge in training."""
    prompt = task.prompt_max_tokens if reward.input == "prompt+response" else 0
    return prompt + generation.max_new_tokens

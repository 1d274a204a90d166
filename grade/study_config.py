"""The settings of the studies: `grade compare` and `grade variance`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Callable, List, Literal, Optional

from grade.errors import GradeError
from grade.method_config import COMPARED

Estimator = Literal["gumbel", "rao", "straight_through", "reinmax"]


@dataclass
class CompareConfig:
    """What `grade compare` adds to the settings of its runs."""

    learning_rate_factors: List[float] = field(default_factory=lambda: [0.3, 1.0, 3.0])
    """Every method is tried with train.learning_rate times each of these, and keeps the best by validation; where
    that is the lowest or the highest, with at most two more beyond it."""
    sweep_steps: int = 50
    """Optimizer steps of each of these trials; 0: none, every method takes train.learning_rate."""
    sweep_seed: int = 1000
    """Seed of these trials; none of the comparison's own."""
    validations: int = 15
    """Validations of a run, evenly spaced; the cuts at equal cost are as fine as they are."""
    samples_per_prompt: Optional[int] = None
    """generation.samples_per_prompt of every run, so that all methods see the same prompts; null: the config's, or 4
    where that is 1 (GRPO and leave-one-out need groups)."""
    jobs: int = 1
    """Runs at the same time, each with an equal share of the CPU's threads."""


@dataclass
class VarianceConfig:
    """What `grade variance` measures: gradients of repeated draws at fixed parameters."""

    methods: Optional[List[str]] = None
    """Of the names that `grade compare` takes; null: those that can use the task's reward."""
    estimators: List[Estimator] = field(default_factory=lambda: ["gumbel", "rao", "straight_through", "reinmax"])
    """Local rules of grade-ste; `grade` always has `gumbel`."""
    taus: List[float] = field(default_factory=lambda: [2.0, 1.0, 0.5])
    """Temperatures of the relaxation, for grade and grade-ste."""
    hops: List[int] = field(default_factory=lambda: [0, 1, 4])
    """Caps on the hops, for grade and grade-ste; the converged gradient (method.hop_tol, no cap) is measured too."""
    lengths: Optional[List[int]] = None
    """Tokens of a response; null: 8, where the bias can be judged, and generation.max_new_tokens."""
    top_ks: Optional[List[int]] = None
    """Candidates per token; null: generation.top_k."""
    draws: int = 32
    """Independent draws of every gradient. Sums over ten blocks of them are kept: 40 bytes a trained parameter."""
    responses: int = 8
    """Responses of a draw."""
    samples_per_prompt: int = 4
    """Responses of a draw that answer one prompt."""
    warmup_draws: int = 16
    """Draws before those that count, which fill REINFORCE's moving average and train PPO's value head."""
    reference_responses: int = 16384
    """Responses behind the unbiased reference (leave-one-out REINFORCE), for lengths up to 8; at least 80 times
    variance.responses, or 0 for none."""
    seed: int = 2000
    """Seed of the draws, apart from the training's."""


# (setting, smallest allowed value, is that value itself allowed)
STUDY_BOUNDS = [
    ("compare.sweep_steps", 0, True),
    ("compare.validations", 1, True),
    ("compare.samples_per_prompt", 1, True),
    ("compare.jobs", 1, True),
    ("variance.draws", 10, True),
    ("variance.responses", 2, True),
    ("variance.samples_per_prompt", 2, True),
    ("variance.warmup_draws", 0, True),
    ("variance.reference_responses", 0, True),
]


def check_studies(compare: CompareConfig, variance: VarianceConfig) -> None:
    """Refuse lists that cannot work.

    Raises:
        GradeError: naming the setting, the reason and the fix.
    """
    _check_list("compare.learning_rate_factors", compare.learning_rate_factors, "numbers above 0", lambda f: f > 0)
    _check_list("variance.taus", variance.taus, "numbers above 0", lambda tau: tau > 0)
    _check_list("variance.hops", variance.hops, "whole numbers from 0 on", lambda hops: hops >= 0)
    _check_list("variance.estimators", variance.estimators, "rules", lambda _: True)
    if variance.lengths is not None:
        _check_list("variance.lengths", variance.lengths, "whole numbers above 0", lambda length: length > 0)
    if variance.top_ks is not None:
        _check_list("variance.top_ks", variance.top_ks, "whole numbers above 0", lambda k: k > 0)
    if variance.responses % variance.samples_per_prompt:
        raise GradeError(
            f"variance.responses ({variance.responses}) is not a multiple of variance.samples_per_prompt "
            f"({variance.samples_per_prompt}). Change one of them."
        )
    if 0 < variance.reference_responses < 80 * variance.responses:
        raise GradeError(
            f"variance.reference_responses is {variance.reference_responses}: too few to judge by. Raise it to "
            f"{80 * variance.responses} (80 * variance.responses) or more, or set it to 0 for no reference."
        )
    if variance.methods is not None:
        names = f"names of {', '.join(COMPARED)}"
        _check_list("variance.methods", variance.methods, names, lambda name: name in COMPARED)


def _check_list(setting: str, values: list, wanted: str, allowed: Callable[[Any], bool]) -> None:
    """Refuse a list that is empty, repeats itself or holds what it may not."""
    wrong = [v for v in values if not (isinstance(v, str) or math.isfinite(v)) or not allowed(v)]
    if not values or wrong or len(set(values)) < len(values):
        raise GradeError(f"{setting} is {values}: name one or more {wanted}, none of them twice.")

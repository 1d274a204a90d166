"""The settings of the studies: `grade compare` and `grade variance`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from grade.config.bounds import BATCH, COUNT, ROWS, SEED, TOKENS, WEIGHT, setting, shown
from grade.config.methods import COMPARED
from grade.config.training import Schedule
from grade.errors import GradeError

Estimator = Literal["gumbel", "rao", "straight_through", "reinmax"]
BLOCKS = 10
"""Parts that draws and prefixes fall into; intervals follow from how these differ, so each needs something in it."""
REFERENCE_DRAWS = 8
"""Draws that the reference takes together: short passes are cheap side by side."""
COPIES = 32
"""Responses of a prefix."""


@dataclass
class CompareConfig:
    """What `grade compare` adds to the settings of its runs."""

    learning_rate_factors: list[float] = setting(default_factory=lambda: [0.3, 1.0, 3.0], gt=0, le=WEIGHT)
    """Every method is tried with train.learning_rate times each of these, and keeps the best by validation; where
    that is the lowest or the highest, with at most two more beyond it."""
    sweep_steps: int = setting(50, ge=0, le=COUNT)
    """Optimizer steps of each of these trials; 0: none, every method takes train.learning_rate, and the schedule of
    compare.schedules where that names one."""
    schedules: list[Schedule] | None = None
    """Learning-rate schedules that every method is tried with at its learning rate, of which it keeps the best by
    validation; null: train.schedule. One alone is that of every trial and run."""
    sweep_seed: int = setting(1000, ge=0, le=SEED)
    """Seed of these trials; none of the comparison's own."""
    validations: int = setting(15, ge=1, le=COUNT)
    """Validations of a run, evenly spaced; the cuts at equal cost are as fine as they are."""
    samples_per_prompt: int | None = setting(None, ge=1, le=BATCH)
    """generation.samples_per_prompt of every run, so that all methods see the same prompts; null: the config's, or 4
    where that is 1 (GRPO and leave-one-out need groups)."""
    jobs: int = setting(1, ge=1, le=1024)
    """Runs at the same time, each with an equal share of the CPU's threads."""
    fluency_model: str | None = None
    """A causal language model (folder or hub name, any vocabulary) that the tests' texts are read with, in nats per
    byte; not model.name. null: trigrams of the judge's texts."""
    frontier_points: int = setting(5, ge=1, le=COUNT)
    """Checkpoints of a run on its frontier of reward against KL, evenly spaced over its validations, the last
    included."""
    frontier_prompts: int = setting(256, ge=0, le=ROWS)
    """Test prompts of a point of the frontier, the first ones; 0: no frontier."""
    kl_coefs: list[float] | None = setting(None, ge=0, le=WEIGHT)
    """Every method and seed also runs with each of these as method.kl_coef, at the method's own learning rate; for the
    frontier alone."""
    best_of: list[int] = setting(default_factory=lambda: [1, 2, 4, 8, 16], ge=1, le=BATCH)
    """The base model's best of n responses by the reward, for each of these n, as the frontier's reference; may be
    empty."""


@dataclass
class VarianceConfig:
    """What `grade variance` measures: gradients of repeated draws at fixed parameters."""

    methods: list[str] | None = None
    """Of the names that `grade compare` takes; null: those that can use the task's reward."""
    estimators: list[Estimator] = field(default_factory=lambda: ["gumbel", "rao", "straight_through", "reinmax"])
    """Local rules of grade-ste; `grade` always has `gumbel`."""
    taus: list[float] = setting(default_factory=lambda: [2.0, 1.0, 0.5], ge=1e-4, le=WEIGHT)
    """Temperatures of the relaxation, for grade and grade-ste."""
    hops: list[int] = setting(default_factory=lambda: [0, 1, 4], ge=0, le=TOKENS)
    """Caps on the hops, for grade and grade-ste; the converged gradient (method.hop_tol, no cap) is measured too."""
    lengths: list[int] | None = setting(None, ge=1, le=TOKENS)
    """Tokens of a response; null: 8, where the bias can be judged, and generation.max_new_tokens."""
    top_ks: list[int] | None = setting(None, ge=1, le=TOKENS)
    """Candidates per token; null: generation.top_k."""
    draws: int = setting(32, ge=BLOCKS, le=COUNT)
    """Independent draws of every gradient. Sums over ten blocks of them are kept: 40 bytes a trained parameter."""
    responses: int = setting(8, ge=2, le=BATCH)
    """Responses of a draw."""
    samples_per_prompt: int = setting(4, ge=2, le=BATCH)
    """Responses of a draw that answer one prompt."""
    warmup_draws: int = setting(16, ge=0, le=COUNT)
    """Draws before those that count, which fill REINFORCE's moving average and train PPO's value head."""
    reference_responses: int = setting(16384, ge=0, le=COUNT)
    """Responses behind the unbiased reference (leave-one-out REINFORCE), for lengths up to 8; at least 80 times
    variance.responses, or 0 for none."""
    step_responses: int = setting(2048, ge=0, le=COUNT)
    """Responses behind the steps and length factors of grade-ste's rules and of rloo, for every length; 32 to a prefix,
    so rounded down to a multiple of 32. At least 320, or 0 for none."""
    seed: int = setting(2000, ge=0, le=SEED - 2)
    """Seed of the draws, apart from the training's."""


def check_studies(compare: CompareConfig, variance: VarianceConfig) -> None:
    """Refuse lists that cannot work.

    Raises:
        GradeError: naming the setting, the reason and the fix.
    """
    _check_list("compare.learning_rate_factors", compare.learning_rate_factors, "numbers")
    if compare.kl_coefs is not None:
        _check_list("compare.kl_coefs", compare.kl_coefs, "numbers")
    if compare.kl_coefs is not None and compare.frontier_prompts == 0:
        raise GradeError(
            "compare.kl_coefs makes runs for the frontier alone, and compare.frontier_prompts is 0: set it to 1 or "
            "more, or compare.kl_coefs to null."
        )
    if compare.best_of:
        _check_list("compare.best_of", compare.best_of, "whole numbers")
    if compare.schedules is not None:
        _check_list("compare.schedules", compare.schedules, "schedules")
        if compare.sweep_steps == 0 and len(compare.schedules) > 1:
            raise GradeError(
                f"compare.schedules is {shown(compare.schedules)}, of which trials choose, and compare.sweep_steps is "
                "0: there are none. Set it to 1 or more, or name one schedule."
            )
    _check_list("variance.taus", variance.taus, "numbers")
    _check_list("variance.hops", variance.hops, "whole numbers")
    _check_list("variance.estimators", variance.estimators, "rules")
    if variance.lengths is not None:
        _check_list("variance.lengths", variance.lengths, "whole numbers")
    if variance.top_ks is not None:
        _check_list("variance.top_ks", variance.top_ks, "whole numbers")
    if variance.responses % variance.samples_per_prompt:
        raise GradeError(
            f"variance.responses ({variance.responses}) is not a multiple of variance.samples_per_prompt "
            f"({variance.samples_per_prompt}). Change one of them."
        )
    least = BLOCKS * REFERENCE_DRAWS
    if 0 < variance.reference_responses < least * variance.responses:
        raise GradeError(
            f"variance.reference_responses is {variance.reference_responses}: too few to judge by. Raise it to "
            f"{least * variance.responses} ({least} * variance.responses) or more, or set it to 0 for no reference."
        )
    if 0 < variance.step_responses < BLOCKS * COPIES:
        raise GradeError(
            f"variance.step_responses is {variance.step_responses}: too few for intervals. Raise it to "
            f"{BLOCKS * COPIES} or more, or set it to 0 to measure no steps."
        )
    if variance.methods is not None:
        names = f"names of {', '.join(COMPARED)}"
        _check_list("variance.methods", variance.methods, names, known=COMPARED)


def _check_list(setting: str, values: list, wanted: str, known: Sequence[str] | None = None) -> None:
    """Refuse a list that is empty, repeats itself or holds what is not known."""
    if not values or len(set(values)) < len(values) or (known is not None and not set(values) <= set(known)):
        raise GradeError(f"{setting} is {shown(values)}: name one or more {wanted}, none of them twice.")

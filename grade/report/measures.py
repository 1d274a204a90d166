"""From runs to the numbers that the report shows. Step s of a validation: s optimizer steps had been made."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from grade.report.data import Run
from grade.report.groups import Group
from grade.report.statistics import WINDOW, estimate, smooth, window_variances
from grade.tables import Estimate

THRESHOLDS = (0.6, 0.7, 0.8, 0.85, 0.9)
COSTS = ("steps", "tokens", "seconds")
_POINTS = 400
"""Most points of a drawn line."""


@dataclass(frozen=True)
class Curve:
    """A measure of a group at each of `x`: mean over seeds, lowest and highest seed, and how many seeds are there."""

    x: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    seeds: np.ndarray
    of: int

    @property
    def last(self) -> float:
        return float(self.mean[-1])


def number(row: dict | None, key: str) -> float | None:
    """A finite number of a row; None if it is not there."""
    value = (row or {}).get(key)
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return None
    try:
        found = float(value)
    except OverflowError:  # a whole number of hundreds of digits
        return None
    return found if math.isfinite(found) else None


# -- over steps ----------------------------------------------------------------------------------------------


def smoothing_window(groups: Sequence[Group]) -> int:
    """Steps of the moving mean: about a twentieth of the longest run, odd; 1 is none."""
    longest = max((run.steps[-1]["step"] + 1 for group in groups for run in group.runs if run.steps), default=1)
    return max(longest // 20, 1) // 2 * 2 + 1 if longest >= 20 else 1


def training_curve(group: Group, key: str, window: int = 1) -> Curve | None:
    """Of the training rows, each seed smoothed by itself; None where no row has `key`. A step without an
    update has no gradient norm."""
    rows = [[row for row in run.steps if key != "grad_norm" or row.get("updates", 1)] for run in group.runs]
    return _curve([[(row["step"], number(row, key)) for row in own] for own in rows], window)


def validation_curve(group: Group, key: str = "reward") -> Curve | None:
    """Of the validations."""
    return _curve([[(row["step"], number(row, key)) for row in run.validation] for run in group.runs])


def gap_curve(group: Group) -> Curve | None:
    """Reward in training since the validation before, less the reward of the validation."""
    return _curve([_gaps(run) for run in group.runs])


def _gaps(run: Run) -> list[tuple[int, float | None]]:
    steps = [row["step"] for row in run.validation]
    gaps = []
    for before, row in zip(steps, run.validation[1:]):  # noqa: B905  one fewer
        trained = estimate([number(r, "reward") for r in run.steps if before <= r["step"] < row["step"]])
        validated = number(row, "reward")
        gaps.append((row["step"], trained.mean - validated if trained and validated is not None else None))
    return gaps


def variance_curve(group: Group) -> Curve | None:
    """Variance of the training reward in windows of `WINDOW` steps, at their first steps."""
    return _curve([[(i * WINDOW, v) for i, v in enumerate(reward_variances(run))] for run in group.runs])


def reward_variances(run: Run) -> list[float]:
    """`window_variances` of the reward in training."""
    return window_variances([reward for row in run.steps if (reward := number(row, "reward")) is not None])


def _curve(seeds: Sequence[Sequence[tuple[int, float | None]]], window: int = 1) -> Curve | None:
    seeds = [[(x, value) for x, value in points if value is not None] for points in seeds]
    seeds = [points for points in seeds if points]
    if not seeds:
        return None
    x = np.array(sorted({at for points in seeds for at, _ in points}))
    place = {at: i for i, at in enumerate(x.tolist())}
    values = np.full((len(seeds), len(x)), np.nan)
    for row, points in zip(values, seeds, strict=True):
        row[[place[at] for at, _ in points]] = [value for _, value in points]
        row[:] = smooth(row, window)
    if len(x) > _POINTS:
        kept = np.linspace(0, len(x) - 1, _POINTS).round().astype(int)
        x, values = x[kept], values[:, kept]
    count = np.isfinite(values).sum(0)
    mean = np.nansum(values, 0) / count
    return Curve(x, mean, np.nanmin(values, 0), np.nanmax(values, 0), count, len(seeds))


# -- cost ----------------------------------------------------------------------------------------------------


def step_seconds(row: dict) -> float:
    """Seconds of a training step, over its phases; validations are not in it."""
    return sum(number(row, key) or 0.0 for key in row if key.startswith("seconds/"))


def cost_before(run: Run, step: int) -> dict[str, float]:
    """What training had cost when `step` optimizer steps were made."""
    rows = [row for row in run.steps if row["step"] < step]
    return {
        "steps": step,
        "tokens": sum(number(row, "tokens") or 0.0 for row in rows),
        "seconds": sum(step_seconds(row) for row in rows),
    }


def first_reaching(run: Run, threshold: float) -> dict[str, float] | None:
    """Cost of the first validation whose reward is at least `threshold`; None if none is."""
    for row in run.validation:
        reward = number(row, "reward")
        if reward is not None and reward >= threshold:
            return cost_before(run, row["step"])
    return None


# -- outcome -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HeldOut:
    """Held-out reward of each seed.

    Attributes:
        split: "test", or "validation" where no run has a test yet.
        values: label of a group -> reward by seed; groups without any are left out.
        base: the base model's.
        missing: names of the runs that have none.
    """

    split: str
    values: dict[str, list[float]]
    base: float | None
    missing: list[str]


def held_out(groups: Sequence[Group]) -> HeldOut:
    """Reward of the best checkpoints on test prompts; on validation prompts where there is no test at all."""
    runs = [run for group in groups for run in group.runs]
    split = "test" if any(run.test for run in runs) else "validation"

    def reward(run: Run) -> float | None:
        return number(run.test if split == "test" else run.best_validation, "reward")

    values = {g.label: [r for run in g.runs if (r := reward(run)) is not None] for g in groups}
    return HeldOut(
        split,
        {label: found for label, found in values.items() if found},
        base_reward(runs, split),
        [run.name for run in runs if reward(run) is None],
    )


def base_reward(runs: Sequence[Run], split: str) -> float | None:
    """The base model's reward: the same in every run, so that of the first that has it."""
    return next((r for run in runs if (r := number(base_row(run, split), "reward")) is not None), None)


def base_row(run: Run, split: str) -> dict | None:
    """The base model's evaluation of a run."""
    if split == "test":
        return run.base_test
    return next((row for row in run.validation if row["step"] == 0), None)


def over_seeds(group: Group, value: Callable[[Run], float | None]) -> Estimate | None:
    """Mean and standard error over the group's runs of `value(run)`, a number or None."""
    return estimate([value(run) for run in group.runs])


def median_of(run: Run, key: str) -> float | None:
    """Median over the run's steps; None where no step has it."""
    known = [value for row in run.steps if (value := number(row, key)) is not None]
    return float(np.median(known)) if known else None


def phase_seconds(group: Group) -> dict[str, float]:
    """Mean seconds per step of each phase, over the steps of all seeds; {} where no step has any."""
    rows = [row for run in group.runs for row in run.steps]
    keys = dict.fromkeys(key for row in rows for key in row if key.startswith("seconds/"))
    return {key[len("seconds/") :]: sum(number(row, key) or 0.0 for row in rows) / len(rows) for key in keys}

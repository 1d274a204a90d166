"""Statistics over a few seeds, as pure functions of lists of numbers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.stats

from grade.tables import Estimate

LEVEL = 0.95
DRAWS = 10_000
WINDOW = 50
"""Steps of a window of `window_variances`."""
Interval = tuple[float, float]


@dataclass(frozen=True)
class Welch:
    """Welch's test of two means: difference of the first to the second, t, degrees of freedom, two-sided p, and the
    interval of the difference at `LEVEL`."""

    difference: float
    t: float
    dof: float
    p: float
    interval: Interval


def estimate(values: Sequence[float | None]) -> Estimate | None:
    """Mean and standard error of the values that are there and finite; None of none."""
    known = [v for v in values if v is not None and math.isfinite(v)]
    if not known:
        return None
    mean = statistics.fmean(known)
    # About the mean, scaled: squares of huge values would leave the range of floats.
    scale = max((abs(v - mean) for v in known), default=0.0) or 1.0
    spread = (sum(((v - mean) / scale) ** 2 for v in known) / max(len(known) - 1, 1)) ** 0.5 * scale
    return Estimate(mean, spread / len(known) ** 0.5 if len(known) > 1 else None, len(known))


def welch(first: Sequence[float], second: Sequence[float]) -> Welch | None:
    """Welch's t-test (unequal variances); None where a side has one value, or neither side has any spread."""
    if min(len(first), len(second)) < 2 or np.var(first) + np.var(second) == 0:
        return None
    found = scipy.stats.ttest_ind(first, second, equal_var=False)
    low, high = found.confidence_interval(LEVEL)
    difference = statistics.fmean(first) - statistics.fmean(second)
    return Welch(difference, float(found.statistic), float(found.df), float(found.pvalue), (float(low), float(high)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction: adjusted p-values, in the order given."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted


def bootstrap_mean(values: Sequence[float], level: float = LEVEL) -> Interval | None:
    """Percentile bootstrap interval of the mean; None of fewer than two values."""
    return _percentiles(_resampled_means(values, seed=0), level) if len(values) > 1 else None


def bootstrap_difference(first: Sequence[float], second: Sequence[float], level: float = LEVEL) -> Interval | None:
    """Percentile bootstrap interval of mean(first) - mean(second), both resampled; None where a side has one value."""
    if min(len(first), len(second)) < 2:
        return None
    return _percentiles(_resampled_means(first, seed=0) - _resampled_means(second, seed=1), level)


def _resampled_means(values: Sequence[float], seed: int) -> np.ndarray:
    known = np.asarray(values, dtype=float)
    picks = np.random.default_rng(seed).integers(len(known), size=(DRAWS, len(known)))
    return known[picks].mean(axis=1)


def _percentiles(draws: np.ndarray, level: float) -> Interval:
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def window_variances(values: Sequence[float], size: int = WINDOW) -> list[float]:
    """Sample variance of each window of `size` consecutive values. The last one may be shorter; a single value, which
    has no variance, is left out."""
    windows = [values[start : start + size] for start in range(0, len(values), size)]
    return [statistics.variance(window) for window in windows if len(window) > 1]


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Centred mean over `window` (odd) entries of a [S] array, fewer at its ends; NaN entries do not count."""
    known = np.isfinite(values)
    kernel = np.ones(min(window, 2 * len(values) - 1))
    middle = slice(len(kernel) // 2, len(kernel) // 2 + len(values))
    totals = np.convolve(np.where(known, values, 0.0), kernel)[middle]
    counts = np.convolve(known.astype(float), kernel)[middle]
    return np.where(known, totals / np.maximum(counts, 1.0), np.nan)

"""The jackknife: a standard error from what a statistic is without one part of its data (Efron & Stein 1981)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import stats


def jackknife_error(left_out: Sequence[float] | np.ndarray) -> float:
    """Standard error of a statistic from its n values [n] without one of n independent parts each."""
    values = np.asarray(left_out, dtype=np.float64)
    n = len(values)
    return float(((n - 1) / n * np.square(values - values.mean()).sum()) ** 0.5)


def critical(parts: int) -> float:
    """Two-sided 95 % quantile of Student's t for a jackknife over parts."""
    return float(stats.t.ppf(0.975, parts - 1))

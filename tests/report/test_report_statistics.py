"""The report's statistics against values computed by hand."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from grade.report.statistics import (
    Estimate,
    bootstrap_difference,
    bootstrap_mean,
    estimate,
    holm,
    smooth,
    welch,
    window_variances,
)


def test_estimate_by_hand():
    assert estimate([1.0, 2.0, 3.0, None, float("nan")]) == Estimate(2.0, pytest.approx(1 / 3**0.5), 3)
    assert estimate([4.0]) == Estimate(4.0, None, 1)
    assert estimate([None]) is None
    # The squares of these leave the range of floats; they differ by 9e307, over 2 ** 0.5 twice.
    assert estimate([1e308, 1e307]) == Estimate(pytest.approx(5.5e307), pytest.approx(4.5e307), 2)
    assert estimate([2.0, 2.0, 2.0]).stderr == 0


def test_welch_by_hand():
    """Means 2 and 4, variances 1 and 4: standard error sqrt(1/3 + 4/3), Welch-Satterthwaite degrees of freedom."""
    found = welch([1.0, 2.0, 3.0], [2.0, 4.0, 6.0])
    stderr, dof = (5 / 3) ** 0.5, (5 / 3) ** 2 / ((1 / 3) ** 2 / 2 + (4 / 3) ** 2 / 2)
    assert found.difference == -2
    assert found.t == pytest.approx(-2 / stderr)
    assert found.dof == pytest.approx(dof)
    assert found.p == pytest.approx(2 * scipy.stats.t.sf(2 / stderr, dof))
    half = scipy.stats.t.ppf(0.975, dof) * stderr
    assert found.interval == pytest.approx((-2 - half, -2 + half))
    assert welch([1.0], [2.0, 3.0]) is None and welch([1.0, 1.0], [2.0, 2.0]) is None  # one value, and no spread


def test_holm_by_hand():
    """0.01 * 3; 0.03 * 2; 0.04 * 1, but no less than the one before it."""
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_bootstrap_of_two_values():
    """Means of a resample of {0, 1} are 0, 1/2, 1 with probabilities 1/4, 1/2, 1/4."""
    assert bootstrap_mean([0.0, 1.0]) == (0.0, 1.0)
    assert bootstrap_mean([0.0, 1.0], level=0.4) == (0.5, 0.5)
    assert bootstrap_mean([1.0]) is None


def test_bootstrap_difference_resamples_both_sides():
    """-1 and 1 each have probability 1/16 of {0, 1} against {0, 1}: inside 95%, outside 80%."""
    assert bootstrap_difference([0.0, 1.0], [0.0, 1.0]) == (-1.0, 1.0)
    assert bootstrap_difference([0.0, 1.0], [0.0, 1.0], level=0.8) == (-0.5, 0.5)
    assert bootstrap_difference([1.0], [0.0, 1.0]) is None


def test_window_variances_include_the_partial_window():
    values = [0.0] * 50 + [0.0, 1.0] * 25 + [3.0, 5.0]
    assert window_variances(values) == pytest.approx([0.0, 25 * 0.5 * 0.5 * 2 / 49, 2.0])
    assert window_variances([0.0] * 51) == [0.0]  # one value alone has no variance
    assert window_variances([1.0]) == []


@pytest.mark.parametrize(
    "values, window, expected",
    [
        ([0.0, 3.0, 6.0, 9.0], 3, [1.5, 3.0, 6.0, 7.5]),
        ([0.0, 3.0, 6.0, 9.0], 1, [0.0, 3.0, 6.0, 9.0]),
        ([0.0, np.nan, 6.0], 3, [0.0, np.nan, 6.0]),
        ([2.0, 4.0], 9, [3.0, 3.0]),
    ],
)
def test_smooth_by_hand(values, window, expected):
    np.testing.assert_allclose(smooth(np.array(values), window), expected)

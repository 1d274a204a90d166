"""How well predicted effects of swaps of tokens agree with true ones: statistics, and what they mean in words.

Swaps in one response are not independent: everything below is left out a response at a time (jackknife, Efron & Stein
1981), and intervals are at 95 %, from Student's t over responses; those of correlations on Fisher's scale (atanh).

Where the correlation's threshold comes from: let u_j be the true effect of candidate j at a position, v_j the predicted
one, pi the candidates' probabilities. Logits that move by v change the expected reward by cov_pi(u, v) to first order,
at a KL of var_pi(v) / 2 to second. At equal KL they gain corr_pi(u, v) of what logits that move by u would.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import stats

from grade.jackknife import critical, jackknife_error
from grade.tables import Cell, Column, Estimate, Table

HALF = 0.5
"""A correlation below which GRADE keeps less than half of what the true effects would gain at equal KL."""
LEAST_RESPONSES = 8
_PARTS = ("whole", "first third", "middle third", "last third")
DRAWN = {
    "policy": "by the policy's probability",
    "top_k": "evenly from top_k",
    "half-way": "by the policy's probability, half-way there",
}
"""How the other candidates are drawn, and in words."""

Interval = tuple[float, float]


@dataclass(frozen=True)
class Swaps:
    """N swaps of a token in some responses, float64 and int64 [N] each.

    Args:
        response: which response.
        third: 0, 1 or 2, the part of the response.
        predicted: the reward's gradient at the token's embedding, times what the embedding changes by.
        true: what the reward really changes by.
    """

    response: np.ndarray
    third: np.ndarray
    predicted: np.ndarray
    true: np.ndarray

    def where(self, keep: np.ndarray) -> Swaps:
        return Swaps(self.response[keep], self.third[keep], self.predicted[keep], self.true[keep])


@dataclass(frozen=True)
class Measured:
    """A statistic with its standard error and 95 % interval; None of those where fewer than three responses have swaps.
    The value is None where it is undefined: one of the effects is always 0."""

    value: float | None
    stderr: float | None
    interval: Interval | None


@dataclass(frozen=True)
class Agreement:
    """Predicted against true effects of some swaps.

    Attributes:
        drawn: a key of `DRAWN`.
        part: of the response.
        swaps, responses: how many.
        pearson, spearman: correlations.
        slope: of true on predicted effects, least squares through the origin; 1: swaps do what is predicted. It is of
            finite swaps among fixed tokens, and no length factor of `grade variance`.
        right_sign: share of the swaps that change the reward whose effect has the predicted sign.
        deviation: standard deviation of the true effects, in units of the reward.
    """

    drawn: str
    part: str
    swaps: int
    responses: int
    pearson: Measured
    spearman: Measured
    slope: Measured
    right_sign: Measured
    deviation: float


def agreements(drawn: str, swaps: Swaps) -> list[Agreement]:
    """Of all of the response and of its thirds, as far as swaps fell there."""
    parts = [swaps, *(swaps.where(swaps.third == third) for third in range(3))]
    return [_agreement(drawn, part, own) for part, own in zip(_PARTS, parts, strict=True) if len(own.true)]


def _agreement(drawn: str, part: str, swaps: Swaps) -> Agreement:
    return Agreement(
        drawn,
        part,
        len(swaps.true),
        len(np.unique(swaps.response)),
        _measured(_pearson, swaps, correlation=True),
        _measured(_spearman, swaps, correlation=True),
        _measured(_slope, swaps),
        _measured(_right_sign, swaps),
        float(swaps.true.std()),
    )


_Statistic = Callable[[np.ndarray, np.ndarray], float]


def _measured(statistic: _Statistic, swaps: Swaps, *, correlation: bool = False) -> Measured:
    value, responses = statistic(swaps.predicted, swaps.true), np.unique(swaps.response)
    if not math.isfinite(value):
        return Measured(None, None, None)
    others = [swaps.response != one for one in responses]
    left_out = np.array([statistic(swaps.predicted[keep], swaps.true[keep]) for keep in others])
    if len(responses) < 3 or not np.isfinite(left_out).all():
        return Measured(value, None, None)
    reach = critical(len(responses))
    error = jackknife_error(left_out)
    if not correlation:
        return Measured(value, error, (value - reach * error, value + reach * error))
    inside = 1 - 1e-12  # where atanh is finite
    middle = math.atanh(min(max(value, -inside), inside))
    around = reach * jackknife_error(np.arctanh(np.clip(left_out, -inside, inside)))
    return Measured(value, error, (math.tanh(middle - around), math.tanh(middle + around)))


def _pearson(predicted: np.ndarray, true: np.ndarray) -> float:
    if len(true) < 2 or np.ptp(predicted) == 0 or np.ptp(true) == 0:
        return math.nan
    return float(np.corrcoef(predicted, true)[0, 1])


def _spearman(predicted: np.ndarray, true: np.ndarray) -> float:
    return _pearson(stats.rankdata(predicted), stats.rankdata(true))


def _slope(predicted: np.ndarray, true: np.ndarray) -> float:
    squares = float(predicted @ predicted)
    return float(predicted @ true) / squares if squares else math.nan


def _right_sign(predicted: np.ndarray, true: np.ndarray) -> float:
    moved = true != 0
    return float((np.sign(predicted) == np.sign(true))[moved].mean()) if moved.any() else math.nan


def verdict(rows: list[Agreement]) -> str:
    """What the correlation of swaps that the policy draws allows to say, in sentences."""
    (whole,) = (row for row in rows if row.drawn == "policy" and row.part == "whole")
    found, slope = whole.pearson, whole.slope
    if whole.deviation == 0:
        return "No swap of a token changed the reward at all: there is nothing to follow."
    if found.value is None:
        return "GRADE cannot follow this reward: its gradient is the same for every swap, and their effects differ."
    if found.interval is None:
        return f"{whole.responses} responses with swaps are too few to judge by: ask for more."
    low, high = found.interval
    known = f"the correlation of predicted and true effects is {found.value:.2f} ({low:.2f} to {high:.2f})"
    if high < 0:
        return f"GRADE would work against this reward: {known}, so its gradient points the wrong way."
    if low <= 0:
        return (
            f"Nothing shows that GRADE can follow this reward: {known}, and that interval includes 0. The "
            f"{whole.responses} responses do not tell from noise what its gradient says of swapping a token."
        )
    if low >= HALF:
        said = f"GRADE can follow this reward: {known}, all of it at least {HALF}."
    elif high < HALF:
        said = (
            f"GRADE follows this reward poorly: {known}, all of it below {HALF}. At equal KL the gradient brings less "
            "than half of what the true effects would."
        )
    else:
        said = f"GRADE follows this reward in part: {known}, above 0, and the interval includes {HALF}."
    if slope.value is not None and slope.interval is not None and not slope.interval[0] <= 1 <= slope.interval[1]:
        said += (
            f" On average a swap does {slope.value:.2f} ({slope.interval[0]:.2f} to {slope.interval[1]:.2f}) of what "
            "is predicted."
        )
    return said


def table(rows: list[Agreement]) -> Table:
    """All of it, mean ± standard error."""
    columns = ["swaps", "Pearson", "Spearman", "slope", "right sign"]
    return Table(
        "Predicted and true effects of swapping a token",
        [Column("candidates drawn"), Column("part"), *(Column(title, 2) for title in columns)],
        [
            [
                DRAWN[row.drawn],
                row.part,
                row.swaps,
                *(_cell(m, row.responses) for m in (row.pearson, row.spearman, row.slope, row.right_sign)),
            ]
            for row in rows
        ],
        "Predicted: the reward's gradient at the token's embedding times the change of the embedding; true: the reward "
        "after the swap minus the reward before. ± one standard error over responses. Slope: of true on predicted, "
        "through the origin; at 1 swaps do what is predicted. Half-way: the embedding in the middle of both tokens.",
    )


def _cell(measured: Measured, responses: int) -> Cell:
    return None if measured.value is None else Estimate(measured.value, measured.stderr, responses)


def plain(rows: list[Agreement]) -> list[dict[str, Any]]:
    """For JSON."""
    return [asdict(row) for row in rows]

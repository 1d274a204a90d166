"""Figures of the variance laboratory: a measure over the temperature, a line per estimator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from grade.report.style import add_legend, method_colour, new_axes

# Okabe and Ito's colours again: rules are told apart as methods are, and by their markers.
_RULES = {
    "gumbel": ("#0072B2", "o"),
    "rao": ("#009E73", "s"),
    "straight_through": ("#D55E00", "^"),
    "reinmax": ("#CC79A7", "D"),
}
_SOFT = ("#E69F00", "v")
_LEVELS = ("-.", ":", (0, (1, 3)), (0, (5, 3)))


def against_tau(rows: Sequence[dict], key: str, title: str, ylabel: str, *, log: bool) -> Figure:
    """Lines over τ of the rules of grade-ste and of soft grade, solid after all hops and dotted after none; level lines
    of rules and methods that have no temperature. `rows` all have `key`."""
    figure, axes = new_axes(title, "temperature τ", ylabel, height=3.6)
    lines = _lines(rows, key)
    for place, ((label, hops), points) in enumerate(lines.items()):
        colour, marker = _SOFT if label == "grade" else _RULES.get(label, ("#888888", "x"))
        taus, values, intervals = zip(*sorted(points), strict=True)
        tau = [at * 1.02 ** (place - (len(lines) - 1) / 2) for at in taus]  # beside each other: bars can be seen
        for at, (low, high) in zip(tau, intervals, strict=True):
            axes.plot([at, at], [low, high], color=colour, linewidth=0.9, alpha=0.6)
        axes.plot(
            tau,
            values,
            color=colour,
            marker=marker,
            markersize=5,
            linewidth=1.4,
            markerfacecolor="none" if hops == 0 else colour,
            **_by_hops(label, hops),
        )
    levels = [row for row in rows if row.get("tau") is None and row.get("hops") in (None, 0, "converged")]
    for place, row in enumerate(levels):
        method, rule = row["method"], row.get("estimator")
        if rule is None:
            look = {"color": method_colour(method), "linestyle": _LEVELS[place % len(_LEVELS)], "label": method}
        else:
            look = {"color": _RULES[rule][0], **_by_hops(rule, row["hops"])}
        axes.axhline(row[key], linewidth=1.2, **look)
    axes.set(xscale="log", yscale="log" if log else "linear")
    ticks = sorted({row["tau"] for row in rows if row.get("tau") is not None})
    axes.set_xticks(ticks, [f"{tau:g}" for tau in ticks], minor=False)
    axes.set_xticks([], minor=True)
    add_legend(figure, axes)
    return figure


def _by_hops(label: str, hops: int | str) -> dict[str, Any]:
    """Label and line style: dotted without hops."""
    return {"label": f"{label}, no hops", "linestyle": ":"} if hops == 0 else {"label": label, "linestyle": "-"}


def _lines(rows: Sequence[dict], key: str) -> dict[tuple, list[tuple]]:
    """(rule or "grade", hops) -> (τ, value, interval), for no hops and all of them."""
    lines: dict[tuple, list[tuple]] = {}
    for row in rows:
        if row.get("tau") is not None and row.get("hops") in (0, "converged"):
            label = row["estimator"] if row["method"] == "grade-ste" else row["method"]
            lines.setdefault((label, row["hops"]), []).append((row["tau"], row[key], _ends(row, key)))
    return lines


def _ends(row: dict, key: str) -> tuple[float, float]:
    """The interval, or the value twice where an end is missing."""
    low, high = row.get(f"{key}_interval") or (None, None)
    return (row[key],) * 2 if low is None or high is None else (low, high)

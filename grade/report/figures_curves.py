"""Figures with lines: a measure over steps, or over what training has cost."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from grade.report.groups import Group
from grade.report.measures import THRESHOLDS, Curve, cost_before, number
from grade.report.style import INK, Style, add_legend, legend_order, new_axes, style_of


def over_steps(
    curves: dict[str, Curve],
    styles: dict[str, Style],
    title: str,
    ylabel: str,
    *,
    log: bool = False,
    level: tuple[float, str] | None = None,
) -> Figure:
    """Mean over seeds with a band from the lowest to the highest seed; dotted where not all seeds are there.

    Args:
        level: a horizontal line, and what it is.
    """
    figure, axes = new_axes(title, "optimizer step", ylabel)
    for label, curve in curves.items():
        style = styles[label]
        full = curve.seeds == curve.of
        if curve.of > 1:
            axes.fill_between(curve.x, curve.low, curve.high, color=style.colour, alpha=0.2, linewidth=0)
        if not full.all():
            axes.plot(curve.x, curve.mean, color=style.colour, linewidth=1, linestyle=":")
        # A point alone, such as the only validation of a run that has just begun, is no line.
        marker = style.marker if full.sum() < 30 else None
        axes.plot(
            curve.x[full],
            curve.mean[full],
            color=style.colour,
            linestyle=style.dash,
            linewidth=1.6,
            label=label,
            marker=marker,
            markersize=4,
        )
    if level is not None:
        axes.axhline(level[0], color=INK, linewidth=1, linestyle="--", label=level[1])
    if log:
        axes.set_yscale("log")
    axes.locator_params(axis="x", integer=True)
    add_legend(figure, axes)
    return figure


def validation(groups: Sequence[Group], curves: dict[str, Curve]) -> Figure:
    """Each seed's validations thin, their mean thick, a star on each seed's best checkpoint."""
    figure, axes = new_axes("Validation reward", "optimizer step", "reward")
    for group in groups:
        if group.label not in curves:
            continue
        style, curve = style_of(group), curves[group.label]
        whole = curve.seeds == curve.of
        axes.plot(
            curve.x[whole],
            curve.mean[whole],
            color=style.colour,
            linestyle=style.dash,
            linewidth=2,
            marker=style.marker,
            markersize=4,
            label=group.label,
        )
        for run in group.runs:
            if len(group.runs) > 1:
                rows = [(row["step"], number(row, "reward")) for row in run.validation]
                axes.plot(*zip(*rows, strict=True), color=style.colour, linewidth=0.8, alpha=0.6) if rows else None
            best = number(run.best_validation, "reward")
            if best is not None and run.best is not None:
                axes.plot(
                    run.best,
                    best,
                    color=style.colour,
                    marker="*",
                    markersize=13,
                    markeredgecolor=INK,
                    markeredgewidth=0.8,
                    linestyle="",
                    zorder=5,
                )
    axes.locator_params(axis="x", integer=True)
    axes.plot([], [], color="none", marker="*", markersize=11, markeredgecolor=INK, linestyle="", label="best")
    add_legend(figure, axes)
    return figure


def against_cost(groups: Sequence[Group], cost: str) -> Figure:
    """Validation reward of every run over what training had cost, with the thresholds."""
    unit = {"tokens": "tokens generated in training", "seconds": "seconds of training"}[cost]
    figure, axes = new_axes(f"Validation reward over {cost}", unit, "reward")
    rewards = []
    for label, style in legend_order(groups).items():
        runs = next(group for group in groups if group.label == label).runs
        for position, run in enumerate(runs):
            points = [
                (cost_before(run, row["step"])[cost], reward)
                for row in run.validation
                if (reward := number(row, "reward")) is not None
            ]
            rewards += [reward for _, reward in points]
            axes.plot(
                [x for x, _ in points],
                [y for _, y in points],
                color=style.colour,
                linestyle=style.dash,
                linewidth=1.2,
                marker=style.marker,
                markersize=3,
                label="_" * (position > 0) + label,
            )
    # Of the thresholds far above everything, the next one is enough to see that it was not reached.
    above = [threshold for threshold in THRESHOLDS if threshold > max(rewards)]
    for threshold in THRESHOLDS:
        if min(rewards) < threshold and threshold not in above[1:]:
            axes.axhline(threshold, color=INK, linewidth=0.8, linestyle=":", alpha=0.6)
            axes.annotate(
                f"{threshold:g}",
                (1, threshold),
                (3, 0),
                xycoords=("axes fraction", "data"),
                textcoords="offset points",
                fontsize=8,
                color=INK,
                ha="left",
                va="center",
            )
    axes.ticklabel_format(axis="x", style="plain")
    axes.xaxis.set_major_formatter(_thousands)
    axes.locator_params(axis="x", nbins=6)
    add_legend(figure, axes)
    return figure


def _thousands(value: float, _: object) -> str:
    return f"{value / 1000:,.4g}k" if abs(value) >= 10_000 else f"{value:,.4g}"

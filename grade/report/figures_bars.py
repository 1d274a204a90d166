"""Figures with one line per method: bars, stacked bars, dots with intervals. Labels stand at the left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from grade.report.statistics import Interval
from grade.report.style import INK, add_legend, drawn, new_axes, tinted
from grade.tables import Estimate

BASE_COLOUR = "#888888"
_HATCHES = ("", "///", "...", "xxx")


def _rows(title: str, xlabel: str, labels: Sequence[str], per_row: float) -> tuple[Figure, Axes]:
    labels = [_on_lines(label) for label in labels]
    lines = max((label.count("\n") + 1 for label in labels), default=1)
    figure, axes = new_axes(title, xlabel, "", height=0.95 + max(per_row, 0.21 * lines * (lines > 1)) * len(labels))
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)  # the first on top
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    return figure, axes


def _on_lines(label: str) -> str:
    """The method, and below it the settings that tell it from others, on two lines at most."""
    method, bracket, settings = label.partition(" (")
    return drawn(method, 34) + (f"\n{drawn(bracket[1:] + settings, 34, lines=2)}" if bracket else "")


def bars(
    labels: Sequence[str],
    colours: Sequence[str],
    series: Mapping[str, Sequence[Estimate | None]],
    title: str,
    xlabel: str,
) -> Figure:
    """A bar per label and entry of `series`, from 0, with its standard error; entries differ in tint and hatch."""
    figure, axes = _rows(title, xlabel, labels, 0.2 + 0.24 * len(series))
    height = 0.8 / len(series)
    for place, estimates in enumerate(series.values()):
        for row, (colour, found) in enumerate(zip(colours, estimates, strict=True)):
            if found is None:
                continue
            axes.barh(
                row - 0.4 + height * (place + 0.5),
                found.mean,
                height * 0.92,
                xerr=found.stderr or None,
                color=tinted(colour, 0.55) if place % 2 else colour,
                hatch=_HATCHES[place % len(_HATCHES)],
                edgecolor=INK,
                linewidth=0.6,
                error_kw={"ecolor": INK, "elinewidth": 1.2, "capsize": 3},
            )
    if len(series) > 1:
        add_legend(
            figure,
            axes,
            [
                Patch(
                    facecolor=tinted(BASE_COLOUR, 0.55) if i % 2 else BASE_COLOUR,
                    edgecolor=INK,
                    linewidth=0.6,
                    hatch=_HATCHES[i % len(_HATCHES)],
                    label=name,
                )
                for i, name in enumerate(series)
            ],
        )
    return figure


def stacked(labels: Sequence[str], parts: Sequence[dict[str, float]], title: str, xlabel: str) -> Figure:
    """A bar per label, made of its named parts; a part has the same shade and hatch in every bar."""
    figure, axes = _rows(title, xlabel, labels, 0.42)
    names = list(dict.fromkeys(name for part in parts for name in part))
    shades = matplotlib.colormaps["viridis"](np.linspace(0.2, 0.95, len(names)))
    handles = []
    for place, (name, shade) in enumerate(zip(names, shades, strict=True)):
        left = [sum(part.get(before, 0.0) for before in names[:place]) for part in parts]
        look = dict(facecolor=shade, edgecolor=INK, linewidth=0.6, hatch=_HATCHES[place % 2])
        axes.barh(range(len(labels)), [part.get(name, 0.0) for part in parts], 0.7, left=left, **look)
        handles.append(Patch(**look, label=name))
    add_legend(figure, axes, handles)
    return figure


def dots(
    labels: Sequence[str],
    colours: Sequence[str],
    values: Sequence[list[float]],
    intervals: Sequence[Interval | None],
    title: str,
    xlabel: str,
    *,
    log: bool = False,
    level: float | None = None,
    level_name: str = "",
) -> Figure:
    """Every value as a small dot, and where there is an interval, it with the mean of the values.

    Args:
        level: a vertical line, named `level_name`.
    """
    figure, axes = _rows(title, xlabel, labels, 0.36 if len(labels) < 12 else 0.26)
    for row, (colour, known, interval) in enumerate(zip(colours, values, intervals, strict=True)):
        if interval is not None:
            axes.plot(interval, [row, row], color=colour, linewidth=4, alpha=0.5, solid_capstyle="butt")
            axes.plot(np.mean(known), row, color=colour, marker="|", markersize=15, markeredgewidth=3)
        axes.plot(
            known,
            [row] * len(known),
            color=colour,
            marker="o",
            markersize=5,
            linestyle="",
            markeredgecolor=INK,
            markeredgewidth=0.5,
        )
    if log:
        axes.set_xscale("log")
    if level is not None:
        line = axes.axvline(level, color=INK, linewidth=1, linestyle="--", label=level_name)
        add_legend(figure, axes, [line])
    return figure


def scatter(
    x: Sequence[float], y: Sequence[float], step: Sequence[int], title: str, xlabel: str, ylabel: str
) -> Figure:
    """Points coloured by step."""
    figure, axes = new_axes(title, xlabel, ylabel)
    shades = matplotlib.colormaps["viridis"].resampled(256)
    shades = matplotlib.colors.ListedColormap(shades(np.linspace(0.15, 0.92, 256)))
    # As an image within the SVG: thousands of points would be thousands of elements.
    points = axes.scatter(x, y, c=step, s=12, cmap=shades, alpha=0.85, linewidths=0, rasterized=True)
    bar = figure.colorbar(points, ax=axes)
    bar.set_label("optimizer step", color=INK)
    bar.ax.tick_params(color=INK, labelcolor=INK)
    bar.outline.set_visible(False)
    return figure

"""Figures of the frontier: a measure against KL, over its square root."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter

from grade.report.style import INK, Style, add_legend, new_axes
from grade.studies.compare.frontier import KL, Point, value_at

_GRID = 60
"""Places at which seeds are averaged."""


def against_kl(
    frontiers: Mapping[str, Mapping[int, Sequence[Point]]],
    frontier: Mapping[str, Any],
    styles: Mapping[str, Style],
    measure: str,
    title: str,
) -> Figure:
    """Each seed's frontier thin with its tested checkpoints as markers, the mean over seeds thick as far as all of them
    reach; the best of n of the base model in ink, each n at a marker.

    Args:
        frontiers: knots by method and seed.
        frontier: of comparison.json.
    """
    figure, axes = new_axes(
        f"{title[:1].upper()}{title[1:]} against KL", "KL from the base, nats a response (√)", title
    )
    axes.set_xscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0)), np.square))
    for method, seeds in frontiers.items():
        style = styles[method]
        points = [p for p in frontier["points"] if p["method"] == method and p.get(measure) is not None]
        axes.plot(
            [p[KL] for p in points],
            [p[measure] for p in points],
            color=style.colour,
            marker=style.marker,
            markersize=4,
            alpha=0.5,
            linestyle="",
            markeredgewidth=0,
        )
        for knots in seeds.values():
            known = [(k[KL], k[measure]) for k in knots if k.get(measure) is not None]
            if known:
                axes.plot(*zip(*known, strict=True), color=style.colour, linewidth=0.8, alpha=0.5)
        axes.plot(
            *_mean(list(seeds.values()), measure),
            color=style.colour,
            linestyle=style.dash,
            linewidth=2,
            marker=style.marker,
            markersize=5,
            markevery=[-1],
            label=method,
        )
    best = [row for row in frontier["best_of"] if row.get(measure) is not None]
    if best:
        axes.plot(
            [row[KL] for row in best],
            [row[measure] for row in best],
            color=INK,
            linewidth=1.2,
            linestyle="--",
            marker=".",
            markersize=6,
            label="best of n",
        )
    if (base := frontier["base"].get(measure)) is not None:
        axes.axhline(base, color=INK, linewidth=0.8, linestyle=":", label="base model")
    most = max((p[KL] for p in [*frontier["points"], *best]), default=1.0)
    axes.set_xlim(0, most * 1.03 if most > 0 else 1.0)
    axes.xaxis.set_major_locator(FixedLocator(_ticks(most)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    add_legend(figure, axes)
    return figure


def _mean(seeds: Sequence[Sequence[Point]], measure: str) -> tuple[list[float], list[float]]:
    """KLs and the mean over seeds there, from 0 to the largest that all reach."""
    end = min(knots[-1][KL] for knots in seeds)
    kls, means = [], []
    for kl in (np.linspace(0, math.sqrt(end), _GRID) ** 2).clip(max=end).tolist():
        known = [value for knots in seeds if (value := value_at(knots, measure, kl)) is not None]
        if len(known) == len(seeds):
            kls.append(kl)
            means.append(fmean(known))
    return kls, means


def _ticks(most: float) -> list[float]:
    """Some KLs whose square roots are about as far from each other: i² times a round step."""
    step = next(s * 10.0**p for p in range(-9, 9) for s in (1, 2, 5) if 36 * s * 10.0**p >= most)
    return [step * i * i for i in range(7)]

"""The plot of `benchmarks.peers`: reward and judge against the seconds of training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

from benchmarks.peers_text import LABELS, MEASURES, base_of, curve, mean_curve, runs_of  # noqa: E402


def plot(path: Path, payload: Mapping[str, Any]) -> None:
    """Means over seeds as thick lines, each seed as a thin one."""
    runs, base = runs_of(payload), base_of(payload)
    measures = [name for name in MEASURES if base[name] is not None]
    figure, axes = pyplot.subplots(1, len(measures), figsize=(5 * len(measures), 4), squeeze=False)
    for axis, measure in zip(axes[0], measures, strict=True):
        for number, (method, rows) in enumerate(runs.items()):
            for row in rows:
                axis.plot(*zip(*curve(row, base, measure), strict=True), color=f"C{number}", linewidth=0.6, alpha=0.5)
            points = mean_curve(rows, base, measure)
            axis.plot(*zip(*points, strict=True), "o-", color=f"C{number}", label=LABELS[method])
        axis.set_xlabel("seconds of training")
        axis.set_ylabel(f"{measure}, validation")
        axis.grid(alpha=0.3)
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)

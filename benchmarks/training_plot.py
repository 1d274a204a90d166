"""The plot of `benchmarks.training`: seconds and memory of a step against the length of the responses."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

from benchmarks.training_setup import ALGORITHMS  # noqa: E402


def plot(path: Path, payload: dict) -> None:
    """Measured points joined by lines; extrapolated ones hollow, on a dashed line."""
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4))
    on_cpu = payload["setting"]["device"] == "cpu"
    memory = ("tensors_gib", "living tensors, GiB") if on_cpu else ("peak_gib", "peak, GiB")
    quantities = (("seconds", "seconds per step"), memory)
    for axis, (key, title) in zip(axes, quantities, strict=True):
        for number, (name, label) in enumerate(ALGORITHMS.items()):
            rows = [row for row in payload["rows"] if row["algorithm"] == name]
            measured = [(row["length"], row[key]) for row in rows if row.get(key) is not None]
            ahead = f"extrapolated_{key}"
            beyond = [(row["length"], row[ahead]) for row in rows if row.get(ahead) is not None]
            color = f"C{number}"
            if measured:
                axis.plot(*zip(*measured, strict=True), "o-", color=color, label=label)
            if measured and beyond:
                points = [measured[-1], *beyond]
                axis.plot(*zip(*points, strict=True), "--", color=color, linewidth=1)
                axis.plot(*zip(*beyond, strict=True), "o", color=color, fillstyle="none")
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xlabel("S, tokens of a response")
        axis.set_ylabel(title)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.grid(alpha=0.3)
    axes[0].legend()
    setting = payload["setting"]
    figure.suptitle(
        f"{setting['shape']}, B = {setting['batch']}, P = {setting['prompt']}, {payload['machine']['device']}"
        " (hollow: extrapolated)",
        fontsize=10,
    )
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)

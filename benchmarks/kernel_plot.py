"""The plot of a kernel benchmark: GB/s against the copy bandwidth, and time relative to ours."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402
from matplotlib.ticker import LogLocator  # noqa: E402


def plot(path: Path, rows: Sequence[dict], device: str, copy: float) -> Path | None:
    """Write the picture; `copy` in GB/s.  None where no row was measured."""
    rows = [row for row in rows if row["status"] == "ok"]
    if not rows:
        return None
    labels = list(dict.fromkeys(label(row) for row in rows))
    names = list(dict.fromkeys(row["implementation"] for row in rows))
    size = (14, 1.5 + 0.12 * len(labels) * (len(names) + 1))
    figure, (speed, ratio) = pyplot.subplots(1, 2, sharey=True, figsize=size)
    height = 0.85 / len(names)
    for number, name in enumerate(names):
        mine = [row for row in rows if row["implementation"] == name]
        places = [labels.index(label(row)) + height * number for row in mine]
        speed.barh(places, [row["gb_s"] for row in mine], height, label=name)
        compared = [(place, row["ratio"]) for place, row in zip(places, mine, strict=True) if row["ratio"] != ""]
        ratio.barh([place for place, _ in compared], [value for _, value in compared], height)
    speed.axvline(copy, color="black", linestyle="--", label=f"copy, {copy:.0f} GB/s")
    speed.set_yticks([place + 0.4 for place in range(len(labels))], labels, fontsize=7)
    speed.set_ylim(len(labels), -0.3)
    speed.set_xlabel("GB/s of the bytes that must move")
    ratio.set_xscale("log")
    ratio.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ratio.xaxis.set_major_formatter("{x:g}")
    ratio.xaxis.set_minor_formatter("")
    ratio.axvline(1, color="black", linestyle="--")
    ratio.set_xlabel("time relative to ours")
    speed.set_title(device)
    figure.legend(loc="lower center", ncols=len(names) + 1, fontsize=8)
    figure.tight_layout(rect=(0, 0.5 / figure.get_figheight(), 1, 1))
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def label(row: dict) -> str:
    return f"{row['kernel']} {row['variant']}, {row['shape'].split()[0]}, {row['dtype']}"

"""The tables of `benchmarks.peers`, and the statistics in them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from grade.machine import machine_line
from grade.tables import Cell, Column, Estimate, Table, numbers

LABELS = {
    "trl-grpo": "GRPO, TRL",
    "trl-rloo": "RLOO, TRL",
    "grade-ste": "GRADE-STE",
    "grpo": "GRPO, here",
    "rloo": "RLOO, here",
}
THEIRS = ("trl-grpo", "trl-rloo")
MEASURES = ("reward", "judge")
"""What is compared at the time that it takes."""
STEP_SECONDS = {"wall": "step_seconds", "process": "step_cpu_seconds"}
"""Where a row has the seconds of its steps, by the clock that counts."""
_RESAMPLES = 2000

Curve = list[tuple[float, float]]
"""Points (seconds of training, value), the base model's at 0 first."""
Runs = Mapping[str, Sequence[dict[str, Any]]]
"""Runs by method, one a seed, in the order of the seeds."""


def objective_of(row: Mapping[str, Any]) -> float:
    """The best objective of a row's evaluations."""
    return max(point["objective"] for point in row["curve"])


def runs_of(payload: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Runs with a curve by method, of the seeds that all of these methods have; their points' "seconds" are those of
    the clock that counts."""
    name = "cpu_seconds" if payload["settings"]["clock"] == "process" else "seconds"
    rows = [
        {**row, "curve": [{**point, "seconds": point[name]} for point in row["curve"]]}
        for row in payload["rows"]
        if row["stage"] == "run" and row["curve"]
    ]
    methods = [name for name in LABELS if any(row["method"] == name for row in rows)]
    by_key = {(row["method"], row["seed"]): row for row in rows}
    seeds = sorted({seed for _, seed in by_key})
    whole = [seed for seed in seeds if all((method, seed) in by_key for method in methods)]
    return {method: [by_key[method, seed] for seed in whole] for method in methods} if whole else {}


def base_of(payload: Mapping[str, Any]) -> dict[str, Any]:
    """The evaluation of the base model."""
    return next(row for row in payload["rows"] if row["stage"] == "base")


def curve(row: Mapping[str, Any], base: Mapping[str, Any], measure: str) -> Curve:
    """A run's values of a measure against its seconds."""
    return [(0.0, base[measure]), *((point["seconds"], point[measure]) for point in row["curve"])]


def mean_curve(rows: Sequence[Mapping[str, Any]], base: Mapping[str, Any], measure: str) -> Curve:
    """Mean over runs, point by point: of their seconds and of their values."""
    points = zip(*(curve(row, base, measure) for row in rows), strict=True)
    return [(statistics.mean(t for t, _ in point), statistics.mean(v for _, v in point)) for point in points]


def value_at(points: Curve, seconds: float) -> float:
    """Between two points on the straight line, after the last its value."""
    times, values = zip(*points, strict=True)
    return float(np.interp(seconds, times, values))


def first_time(points: Curve, value: float) -> float | None:
    """When the straight lines between the points first reach a value, seconds; None: not."""
    if points[0][1] >= value:
        return points[0][0]
    for (t0, v0), (t1, v1) in pairwise(points):
        if v1 >= value:
            return t0 + (t1 - t0) * (value - v0) / (v1 - v0)
    return None


def common_seconds(runs: Runs) -> float:
    """The training time that all runs have had."""
    return min(row["curve"][-1]["seconds"] for rows in runs.values() for row in rows)


def best_of_theirs(runs: Runs, base: Mapping[str, Any], measure: str) -> tuple[str, float, float]:
    """The method of TRL whose mean curve comes highest, its value there and the seconds until then."""
    found = []
    for method in THEIRS:
        if method in runs:
            points = mean_curve(runs[method], base, measure)
            value = max(v for _, v in points)
            found.append((value, -(first_time(points, value) or 0.0), method))
    value, seconds, method = max(found)
    return method, value, -seconds


def times_faster(runs: Runs, base: Mapping[str, Any], method: str, measure: str) -> float | None:
    """TRL's seconds to its best over the method's to the same value: 0 where it does not come there, None where TRL
    is never above the base model, so that there is nothing to reach."""
    _, value, theirs = best_of_theirs(runs, base, measure)
    ours = first_time(mean_curve(runs[method], base, measure), value)
    if theirs == 0.0:
        return None
    if ours is None:
        return 0.0
    return theirs / ours if ours > 0 else None


def interval(runs: Runs, base: Mapping[str, Any], method: str, measure: str) -> tuple[float, float] | None:
    """95 % of `times_faster` over resamples of the seeds, drawn together for all methods; None for one seed."""
    count = len(runs[method])
    if count < 2:
        return None
    generator, found = np.random.default_rng(0), []
    seen: dict[tuple[int, ...], float | None] = {}
    for _ in range(_RESAMPLES):
        chosen = tuple(sorted(generator.integers(count, size=count).tolist()))
        if chosen not in seen:
            drawn = {name: [rows[i] for i in chosen] for name, rows in runs.items()}
            seen[chosen] = times_faster(drawn, base, method, measure)
        if (ratio := seen[chosen]) is not None:
            found.append(ratio)
    if not found:
        return None
    low, high = np.quantile(found, [0.025, 0.975], method="inverted_cdf")
    return float(low), float(high)


def speed_table(payload: Mapping[str, Any]) -> Table:
    """Time and memory of a step of every method."""
    lines = []
    for method, label in LABELS.items():
        rows = [row for row in payload["rows"] if row["stage"] == "run" and row["method"] == method]
        if not rows:
            continue
        # Steps without an evaluation before them, which leaves memory behind: short runs have most of those.
        held = rows + [row for row in payload["rows"] if row["stage"] == "pace" and row["method"] == method]
        # The first two steps of a run find caches cold, and of ours also what is tried once.
        wall, busy = ([s for row in rows for s in row[name][2:]] for name in STEP_SECONDS.values())
        seconds = busy if payload["settings"]["clock"] == "process" else wall
        tokens = sum(t for row in rows for t in row["step_tokens"][2:])
        lines.append(
            [
                label,
                str(len(rows)),
                _spread(wall),
                _spread(busy),
                f"{tokens / sum(seconds):.0f}",
                f"{max(row['peak_gib'] for row in held):.2f}",
                f"{max(row['peak_gib'] - row['loaded_gib'] for row in held):.2f}",
                f"{statistics.median(row['before_seconds'] for row in rows):.1f}",
            ]
        )
    titles = ("runs", "s / step", "CPU s / step", "tokens/s", "peak, GiB", "above what was loaded", "s before step 1")
    return Table("speed", [Column("method"), *numbers(titles)], lines)


def settings_table(payload: Mapping[str, Any], runs: Runs) -> Table:
    """What the sweep has chosen."""
    lines = []
    for method, rows in runs.items():
        trials = [row for row in payload["rows"] if row["stage"] == "sweep" and row["method"] == method]
        failed = sum("failed" in row for row in trials)
        first = rows[0]
        options = ", ".join(f"`{name}` {value}" for name, value in first["options"].items())
        lines.append(
            [
                LABELS[method],
                f"{len(trials)}, {failed} failed" if failed else str(len(trials)),
                f"{first['learning_rate']:.3g}",
                first["schedule"],
                options or "–",
                str(first["steps"]),
            ]
        )
    columns = [Column("method"), *numbers(["trials", "learning rate"]), Column("schedule"), Column("further settings")]
    return Table("settings", [*columns, *numbers(["steps"])], lines)


def equal_time_table(runs: Runs, base: Mapping[str, Any]) -> Table:
    """All measures at the common training time."""
    names = ("reward", "objective", "judge", "kl", "length")
    seconds = common_seconds(runs)
    lines: list[list[Cell]] = [["base", "–", *(base[name] for name in names)]]
    for method, rows in runs.items():
        values = [[_at(row, base, name, seconds) for row in rows] for name in names]
        lines.append([LABELS[method], str(len(rows)), *map(_estimate, values)])
    titles = ("reward", "objective", "judge", "KL, nats / token", "length, tokens")
    columns = [Column(title, 1 if title.startswith("length") else 3) for title in titles]
    return Table("equal time", [Column("method"), *numbers(["seeds"]), *columns], lines)


def reach_table(runs: Runs, base: Mapping[str, Any]) -> Table:
    """Seconds to TRL's best value of each measure."""
    lines: list[list[str]] = []
    for measure in MEASURES:
        if base[measure] is None:
            continue
        best, value, theirs = best_of_theirs(runs, base, measure)
        for method in runs:
            seconds = first_time(mean_curve(runs[method], base, measure), value)
            ratio, spread = times_faster(runs, base, method, measure), interval(runs, base, method, measure)
            between = "" if spread is None else f" ({spread[0]:.3g}–{spread[1]:.3g})"
            lines.append(
                [
                    f"{measure} {value:.3f}, {LABELS[best]} after {theirs:.1f} s",
                    LABELS[method],
                    "not reached" if seconds is None else f"{seconds:.1f}",
                    "–" if ratio is None or seconds is None else f"{ratio:.3g}{between}",
                ]
            )
    columns = [Column("TRL's best"), Column("method"), *numbers(["s until then", "times faster (95 %)"])]
    return Table("time to TRL's best", columns, lines)


def document(payload: Mapping[str, Any]) -> str:
    """Everything that was measured."""
    settings, runs = payload["settings"], runs_of(payload)
    config = settings["config"]
    generation, train = config["generation"], config["train"]
    parts = [
        f"`{config['name']}`: {train['batch_size'] * train['accumulation_steps']} responses of at most "
        f"{generation['max_new_tokens']} tokens a step, {generation['samples_per_prompt']} to a prompt; "
        f"{settings['threads']} thread(s) a process. A step's seconds: median, and the 20th and 80th percentile.",
        speed_table(payload).markdown(),
    ]
    if runs:
        base, count = base_of(payload), config["evaluation"]["validation_prompts"]
        clock = " (seconds on the CPU, of a machine that did other work)" if settings["clock"] == "process" else ""
        parts += [
            settings_table(payload, runs).markdown(),
            f"After {common_seconds(runs):.1f} s of training{clock}, on {count} validation prompts; mean ± standard "
            "error over seeds (– for one seed).",
            equal_time_table(runs, base).markdown(),
            f"Training time{clock} until the mean over seeds reaches the best of TRL's means:",
            reach_table(runs, base).markdown(),
        ]
    return "\n\n".join([*parts, machine_line(payload["machine"])]) + "\n"


def _at(row: Mapping[str, Any], base: Mapping[str, Any], name: str, seconds: float) -> float | None:
    return None if base[name] is None else value_at(curve(row, base, name), seconds)


def _spread(seconds: Sequence[float]) -> str:
    low, high = np.quantile(seconds, [0.2, 0.8])
    return f"{statistics.median(seconds):.3g} ({low:.3g}–{high:.3g})"


def _estimate(values: Sequence[float | None]) -> Cell:
    known = [value for value in values if value is not None]
    if not known:
        return None
    error = statistics.stdev(known) / len(known) ** 0.5 if len(known) > 1 else None
    return Estimate(statistics.mean(known), error, len(known))

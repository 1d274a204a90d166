"""Sections on cost: what it took to reach a reward, and what a step takes of time and memory."""

from __future__ import annotations

from grade.report.data import Run
from grade.report.figures_bars import bars, stacked
from grade.report.figures_curves import against_cost
from grade.report.groups import Group
from grade.report.measures import (
    COSTS,
    THRESHOLDS,
    first_reaching,
    median_of,
    number,
    over_seeds,
    phase_seconds,
    step_seconds,
)
from grade.report.parts import Drawing, Section
from grade.report.statistics import estimate
from grade.report.view import View
from grade.tables import Cell, Column, Table


def efficiency(view: View) -> Section:
    section = Section("efficiency", "Sample efficiency")
    validated = [group for group in view.groups if any(run.validation for run in group.runs)]
    if not validated:
        section.note("No validation yet, so no threshold can have been reached.")
        return section
    for cost in COSTS[1:]:
        section.add(
            Drawing(
                f"efficiency_{cost}",
                against_cost(validated, cost),
                f"Validation reward of every run over {cost} that training had taken; dotted: thresholds. Each line is "
                f"one seed; {view.seeds}.",
                f"Validation reward over {cost}, one line a run.",
            )
        )
    every = sorted({str(group.setting("evaluation.every")) for group in validated})
    section.add(
        Table(
            "efficiency",
            [Column("method"), Column("cost"), *(Column(f"{threshold:g}", 0) for threshold in THRESHOLDS)],
            [
                [group.label, cost, *(_reached(group, t, cost) for t in THRESHOLDS)]
                for group in validated
                for cost in COSTS
            ],
            "Cost in training of the first validation whose reward is at least the threshold; mean ± "
            "standard error over "
            f"seeds where all of them reached it (none for one seed). Validations are {' or '.join(every)} "
            "steps apart, "
            f"and no cost is known more finely. 0: the base model is there already. {view.seeds}.",
        )
    )
    going_on = [run.name for run in view.unfinished()]
    if going_on:
        section.note(f"Not at their last step, so may yet reach more: {', '.join(going_on)}.")
    return section


def _reached(group: Group, threshold: float, cost: str) -> Cell:
    found = [first_reaching(run, threshold) for run in group.runs]
    reached = [costs[cost] for costs in found if costs is not None]
    if len(reached) == len(found):
        return estimate(reached)
    return f"not reached ({len(reached)} of {len(found)})" if reached else "not reached"


def speed(view: View) -> Section:
    section = Section("speed", "Speed and memory")
    phases = {group.label: parts for group in view.groups if (parts := phase_seconds(group))}
    if phases:
        section.add(
            Drawing(
                "seconds_per_phase",
                stacked(list(phases), list(phases.values()), "Seconds per step", "seconds per optimizer step"),
                f"Mean over all steps, by phase; validations and tests are not in it. {view.seeds}.",
                "Seconds per step: " + ", ".join(f"{label} {sum(p.values()):.3g}" for label, p in phases.items()) + ".",
            )
        )
    else:
        section.note("No seconds/… in metrics.jsonl: no times.")
    throughput = [over_seeds(group, lambda run: median_of(run, "tokens_per_second")) for group in view.groups]
    memory = [over_seeds(group, _peak_gib) for group in view.groups]
    for name, title, unit, what, found in (
        ("throughput", "Throughput", "tokens per second", "median over the steps of a run", throughput),
        ("peak_memory", "Peak memory", "GiB", "largest of a run; allocated on the GPU, or resident on a CPU", memory),
    ):
        if not any(found):
            section.note(f"{title}: not in metrics.jsonl.")
            continue
        section.add(
            Drawing(
                name,
                bars(view.labels, view.colours, {name: found}, title, unit),
                f"{title}, {unit}: {what}. Bar: mean over seeds; whisker: ± one standard error over seeds; "
                f"{view.seeds}.",
                f"{title} in {unit}: "
                + ", ".join(
                    f"{label} {value.mean:.3g}" for label, value in zip(view.labels, found, strict=True) if value
                )
                + ".",
            )
        )
    names = list(dict.fromkeys(name for parts in phases.values() for name in parts))
    section.add(
        Table(
            "speed",
            [
                Column("method"),
                Column("seconds per step"),
                Column("tokens per second", 0),
                Column("peak memory, GiB", 2),
                *(Column(f"{name}, seconds per step") for name in names),
            ],
            [
                [
                    group.label,
                    over_seeds(group, _seconds_per_step),
                    throughput[i],
                    memory[i],
                    *_phase_cells(phases.get(group.label, {}), names),
                ]
                for i, group in enumerate(view.groups)
            ],
            f"Mean ± standard error over seeds (none for one seed); phases: mean over all steps; {view.seeds}.",
        )
    )
    jobs = view.study.comparison.get("config", {}).get("compare", {}).get("jobs") or 1
    if jobs > 1:
        section.warn(f"{jobs} runs shared the machine at a time: each had a share of it, and times vary the more.")
    return section


def _phase_cells(parts: dict[str, float], names: list[str]) -> list[float | None]:
    return [parts.get(name) for name in names]


def _seconds_per_step(run: Run) -> float | None:
    timed = [seconds for row in run.steps if (seconds := step_seconds(row))]
    return sum(timed) / len(timed) if timed else None


def _peak_gib(run: Run) -> float | None:
    return max((gib for row in run.steps if (gib := number(row, "memory/peak_gib")) is not None), default=None)

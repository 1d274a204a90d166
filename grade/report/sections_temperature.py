"""Section on the temperature of the relaxation: its schedule, the reward at it, and what other schedules gave."""

from __future__ import annotations

import re
from statistics import fmean

from grade.config.methods import DIFFERENTIATING
from grade.report.data import Run
from grade.report.figures_bars import dots, scatter
from grade.report.figures_curves import over_steps
from grade.report.groups import SCHEDULE, Group, differing, plain, short
from grade.report.measures import number, over_seeds, training_curve
from grade.report.parts import Drawing, Section
from grade.report.statistics import bootstrap_mean, estimate
from grade.report.view import View
from grade.tables import Column, Table


def temperature(view: View) -> Section:
    section = Section("temperature", "Temperature")
    relaxed = [group for group in view.groups if group.method in DIFFERENTIATING]
    if not relaxed:
        section.note(f"No run of {' or '.join(DIFFERENTIATING)}, and only these have a temperature.")
        return section
    curves = {group.label: curve for group in relaxed if (curve := training_curve(group, "tau")) is not None}
    if not curves:
        section.note("No tau in metrics.jsonl.")
        return section
    section.add(
        Drawing(
            "tau",
            over_steps(curves, view.styles, "Temperature", "temperature τ"),
            f"Temperature τ of the relaxation over optimizer steps. {view.band}",
            "Temperature over steps: "
            + ", ".join(f"{k} from {c.mean[0]:.3g} to {c.last:.3g}" for k, c in curves.items()),
        )
    )
    constant = [note for group in relaxed if (note := _reward_against_tau(section, group))]
    if constant:
        section.note(f"No reward against τ to show: {'; '.join(constant)}.")
    _ablation(view, section, relaxed)
    return section


def _reward_against_tau(section: Section, group: Group) -> str | None:
    """Add the figure, or say why there is none."""
    rows = [row for run in group.runs for row in run.steps]
    points = [
        (tau, reward, row["step"])
        for row in rows
        if (tau := number(row, "tau")) is not None and (reward := number(row, "reward")) is not None
    ]
    values = {tau for tau, _, _ in points}
    if len(values) < 2:
        return f"{group.label}, " + (f"τ is {plain(values.pop())} at every step" if values else "no step has both")
    taus, rewards, steps = zip(*points, strict=True)
    section.add(
        Drawing(
            f"reward_tau_{re.sub(r'[^a-z0-9]+', '_', group.label.lower()).strip('_')}",
            scatter(taus, rewards, steps, f"Reward against τ: {group.label}", "τ", "reward in training"),
            f"{group.label}: each dot is a step of a seed, its colour the step; n = {len(group.runs)} "
            f"seed{'s' * (len(group.runs) > 1)}. The reward also rises with training, and τ falls with it: the figure "
            "does not say which of the two did it.",
            f"Mean reward of a step against its temperature, {group.label}.",
        )
    )
    return None


def _ablation(view: View, section: Section, relaxed: list[Group]) -> None:
    """Groups of a method that differ in the schedule, side by side."""
    methods = dict.fromkeys(group.method for group in relaxed)
    several = [m for m in methods if len({_schedule(group) for group in relaxed if group.method == m}) > 1]
    for method in several:
        _schedules(view, section, method, [group for group in relaxed if group.method == method])
    if not several:
        section.note(
            "One schedule per method was run: no ablation. Runs with other tau_start, tau_end or tau_steps in one "
            "folder make one."
        )


def _schedules(view: View, section: Section, method: str, groups: list[Group]) -> None:
    others = [short(name) for name in differing([group.runs[0] for group in groups]) if name not in SCHEDULE]
    if others:
        section.warn(f"The schedules of {method} also differ in {', '.join(others)}: not the temperature alone.")
    found = view.held_out
    known = [group for group in groups if group.label in found.values]
    if not known:
        section.note(f"{method}: several schedules, and no evaluation of them yet.")
        return
    values, name = [found.values[group.label] for group in known], f"schedules_{method.replace('-', '_')}"
    section.add(
        Drawing(
            name,
            dots(
                [_schedule(group) for group in known],
                [view.styles[group.label].colour for group in known],
                values,
                [bootstrap_mean(v) for v in values],
                f"Schedules of {method}",
                f"reward, {found.split}",
                level=found.base,
                level_name="base model",
            ),
            f"Held-out ({found.split}) reward by temperature schedule. Dot: a seed; bar and mark: 95% "
            "bootstrap interval "
            f"and mean over seeds. {view.held_out_seeds}.",
            f"{found.split} reward: "
            + ", ".join(f"{_schedule(group)} {fmean(v):.3f}" for group, v in zip(known, values, strict=True))
            + ".",
        )
    )
    section.add(
        Table(
            name,
            [
                Column("schedule"),
                Column("seeds", 0),
                Column("τ at the last step", 2),
                Column("held-out reward"),
                Column("KL in training, last step, nats per token"),
            ],
            [
                [
                    _schedule(group),
                    len(v),
                    over_seeds(group, lambda run: _last(run, "tau")),
                    estimate(v),
                    over_seeds(group, lambda run: _last(run, "kl")),
                ]
                for group, v in zip(known, values, strict=True)
            ],
            f"Temperature schedules of {method}; held-out ({found.split}) reward: mean ± standard error over seeds.",
        )
    )


def _schedule(group: Group) -> str:
    """In words; a constant one does not depend on its number of steps."""
    start, end, steps = map(group.setting, SCHEDULE)
    return f"τ {plain(start)}" if start == end else f"τ {plain(start)} → {plain(end)} in {steps} steps"


def _last(run: Run, key: str) -> float | None:
    return number(run.steps[-1], key) if run.steps else None

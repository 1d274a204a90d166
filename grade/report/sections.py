"""The page's sections in order, the summary first."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from grade.machine import machine_line
from grade.report.data import Run, Study
from grade.report.groups import plain, settings_of
from grade.report.measures import cost_before
from grade.report.parts import Section
from grade.report.samples import samples
from grade.report.sections_cost import efficiency, speed
from grade.report.sections_frontier import frontier
from grade.report.sections_gradients import gradients
from grade.report.sections_outcome import final, significance
from grade.report.sections_temperature import temperature
from grade.report.sections_training import learning, validated
from grade.report.sections_variance import variance
from grade.report.sessions import recorded, session_rows
from grade.report.view import View
from grade.tables import Cell, Column, Table

_FACTS = (
    ("model", "model.name"),
    ("reward", "reward.model"),
    ("KL coefficient", "method.kl_coef"),
    ("which is steered to a KL of, nats", "method.target_kl"),
    ("learning rate", "train.learning_rate"),
    ("steps planned", "train.steps"),
    ("longest response, tokens", "generation.max_new_tokens"),
    ("candidates, top_k", "generation.top_k"),
)
_PARTS = (learning, validated, gradients, efficiency, final, frontier, temperature, speed, significance, samples)


def all_sections(study: Study) -> list[Section]:
    """Everything the page has to say about a study."""
    if study.kind == "variance":
        return [_measurements(study)]
    view = View(study)
    return [summary(view), *(section for part in _PARTS if (section := part(view)) is not None)]


def _measurements(study: Study) -> Section:
    section = Section("variance", "Gradient estimators at fixed parameters")
    config = study.variance.get("config", {})
    facts = [
        ["model", str(config.get("model", {}).get("name"))],
        ["task", str(config.get("task", {}).get("name"))],
        ["parameters", "trained" if study.variance.get("adapter_sha256") else "the adapter's initial state"],
        ["machine", _machine(study)],
    ]
    section.add(Table("summary", [Column("what"), Column("value")], facts))
    variance(study, section)
    return section


def summary(view: View) -> Section:
    section = Section("summary", "Summary")
    study = view.study
    section.add(Table("summary", [Column("what"), Column("value")], _facts(view)))
    for problem in study.problems:
        section.warn(problem)
    for name, reason in study.comparison.get("failures", {}).items():
        section.warn(f"Failed: {name}: {reason}")
    unfinished = view.unfinished()
    if unfinished:
        section.warn("Not finished, so shown as far as they have come: " + ", ".join(map(_progress, unfinished)) + ".")
    if view.alone:
        section.warn(f"One seed only: {view.alone}. What differs may be chance.")
    section.add(
        Table(
            "runs",
            [
                Column("run"),
                Column("method"),
                Column("seed"),
                Column("steps"),
                Column("validations", 0),
                Column("best step", 0),
                Column("tokens", 0),
                Column("training, seconds", 0),
                Column("learning rate"),
                Column("tested"),
            ],
            [_run_row(run, group.label) for group in view.groups for run in group.runs],
            "Every run.",
        )
    )
    rows = session_rows(study.runs)
    if rows:
        section.add(
            Table(
                "sessions",
                [
                    Column("run"),
                    Column("started", right=True),
                    Column("ended", right=True),
                    Column("after step", 0),
                    Column("command"),
                ],
                rows,
                "When runs were started, or went on; UTC.",
            )
        )
    _settings(view, section)
    _sweep(study, section)
    return section


def _facts(view: View) -> list[list[Cell]]:
    study, runs = view.study, view.runs
    seeds = sorted({run.seed for run in runs})
    facts: list[list[Cell]] = [
        ["kind", {"run": "one run", "comparison": "a comparison", "runs": "a folder of runs"}[study.kind]],
        ["task", _distinct(_task(run) for run in runs)],
        ["methods", ", ".join(view.labels)],
        ["seeds", ", ".join(map(str, seeds))],
    ]
    for title, name in _FACTS:
        found = _distinct(plain(run.config[name]) for run in runs if run.config.get(name) is not None)
        if found:
            facts.append([title, found])
    facts.append(["responses per step", _distinct(_responses(run) for run in runs)])
    facts.append(["smoothing", view.smoothing])
    made = recorded(runs)
    facts += [[title, _distinct(made[title])] for title in ("versions", "git commit") if made[title]]
    facts.append(["machine", _machine(study) if study.machine else _distinct(made["machine"]) or "not recorded"])
    return facts


def _machine(study: Study) -> str:
    return machine_line(study.machine).removeprefix("Machine: ") if study.machine else "not recorded"


def _distinct(values: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(values))


def _task(run: Run) -> str:
    task = run.record.get("task")
    task = task if isinstance(task, dict) else {}
    name, data = task.get("task", run.config.get("task.name")), task.get("dataset", run.config.get("task.dataset"))
    return f"{name} ({data})" if data else str(name)


def _responses(run: Run) -> str:
    size, count = run.config.get("train.batch_size"), run.config.get("train.accumulation_steps")
    return "unknown" if size is None or count is None else str(size * count)


def _progress(run: Run) -> str:
    planned = "" if run.planned is None else f" of {run.planned}"
    return f"{run.name} ({len(run.steps)}{planned} steps)"


def _run_row(run: Run, label: str) -> list[Cell]:
    cost = cost_before(run, len(run.steps))
    steps = str(len(run.steps)) + ("" if run.planned is None else f" of {run.planned}")
    return [
        run.name,
        label,
        str(run.seed),
        steps,
        len(run.validation),
        run.best,
        int(cost["tokens"]),
        cost["seconds"],
        plain(run.config.get("train.learning_rate", "–")),
        "yes" if run.test else "no",
    ]


def _settings(view: View, section: Section) -> None:
    """What is not the same in all groups, beside the method."""
    found = settings_of(view.groups)
    if not found:
        return
    section.add(
        Table(
            "settings",
            [Column("setting"), *(Column(label) for label in view.labels)],
            [[name, *values] for name, values in found.items()],
            "Settings in which methods differ, beside those of the methods themselves.",
        )
    )
    unlike = [name for name in found if not name.startswith(("method.", "train.learning_rate"))]
    if unlike:
        section.warn(f"Not like for like: {', '.join(unlike)} differ, and comparisons of these runs compare that too.")


def _sweep(study: Study, section: Section) -> None:
    rows = [row for row in study.comparison.get("sweep", []) if isinstance(row, dict)]
    if rows:
        section.add(
            Table(
                "sweep",
                [
                    Column("method"),
                    Column("learning rate", 6),
                    Column("schedule"),
                    Column("objective on validation"),
                    Column("chosen"),
                ],
                [
                    [
                        row.get("method"),
                        row.get("learning_rate"),
                        row.get("schedule"),
                        row.get("objective"),
                        "yes" if _is_chosen(row, study.comparison) else "",
                    ]
                    for row in rows
                ],
                "Learning rates and schedules tried, and the objective that each method's were chosen by.",
            )
        )


def _is_chosen(trial: dict, comparison: Mapping[str, Any]) -> bool:
    """Whether a method's runs have the learning rate and the schedule of this trial."""
    method = trial.get("method")
    schedule = comparison.get("schedules", {}).get(method)  # None in files of earlier versions, in both
    return (trial.get("learning_rate"), trial.get("schedule")) == (
        comparison.get("learning_rates", {}).get(method),
        schedule,
    )

"""A folder as plain data: its runs, what a comparison adds to them, the machine, the variance laboratory.

Read as it is found: a run that goes on has a last line cut short and no test yet, and what is missing stays missing.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from grade.config import flatten
from grade.config.methods import COMPARED, VARIANTS
from grade.config.yaml_files import plain_yaml
from grade.errors import GradeError
from grade.formats import COMPARISON, COUNT, EVALUATIONS_SHOWN, RECORD, SETTINGS_SHOWN, TESTS_SHOWN, VARIANCE
from grade.jsonl import read_rows
from grade.shapes import is_too_deep, misfit

BASE = "base/None/0"
"""The base model's key in tests.json."""


@dataclass(frozen=True)
class Run:
    """One run, finished or going on.

    Attributes:
        name: of its folder.
        method: as `grade compare` calls it.
        config: settings by dotted name, such as "train.steps".
        record: run.json.
        steps: rows of metrics.jsonl, one a training step, in order.
        validation: evaluations by step, `details` beside the other numbers; step 0 is the base model.
        best: step of the best checkpoint: the comparison's choice, else the run's own; None before there is one.
        base_test, test: the base model and that checkpoint on test prompts; None without a test.
    """

    name: str
    method: str
    seed: int
    config: dict[str, Any]
    record: dict
    steps: list[dict]
    validation: list[dict]
    best: int | None
    base_test: dict | None
    test: dict | None

    @property
    def planned(self) -> int | None:
        """Steps that its config asks for."""
        return self.config.get("train.steps")

    @property
    def complete(self) -> bool:
        """All steps are trained, and the last is validated."""
        return bool(self.validation) and len(self.steps) == self.planned == self.validation[-1]["step"]

    @property
    def best_validation(self) -> dict | None:
        return next((row for row in self.validation if row["step"] == self.best), None)


@dataclass(frozen=True)
class Study:
    """What a report is about.

    Attributes:
        kind: "run", "comparison", "runs", or "variance" for measurements of `grade variance` without a run.
        comparison: comparison.json; {} where there is none.
        variance: variance.json; {} where there is none.
        problems: files that could not be read, in words.
    """

    title: str
    kind: str
    runs: list[Run]
    comparison: dict
    variance: dict
    problems: list[str]

    @property
    def machine(self) -> dict | None:
        """The comparison's, or that of measurements by themselves; those of a run are in its sessions."""
        return self.comparison.get("machine") or (self.variance.get("machine") if self.kind == "variance" else None)


def load_study(folder: Path) -> Study:
    """Read a run, a comparison, a folder of runs, or measurements of `grade variance`.

    Raises:
        GradeError: there is none of them.
    """
    problems: list[str] = []
    if not folder.is_dir():
        raise GradeError(f"{folder} is not a folder. Name that of a run, of a comparison, or one that holds runs.")
    if (folder / "config.yaml").is_file():
        kind, found = "run", [folder]
    else:
        found = _run_folders(folder)
        is_comparison = any((folder / name).exists() for name in ("comparison.json", "tests.json", "sweep"))
        kind = "comparison" if is_comparison else "runs"
        if not found and (found := _run_folders(folder / "sweep")):
            problems.append("No run of the comparison has begun: these are the trials of its learning-rate sweep.")
    runs = [run for path in found if (run := _load_run(path, problems)) is not None]
    variance = _variance(folder, runs, problems)
    if not runs and not variance:
        reasons = " ".join(problems) or "There is no config.yaml in it, nor in the folders in it."
        raise GradeError(
            f"{folder} holds no run. {reasons} Name the folder of a run, of a comparison (compare-NAME), of "
            "measurements (variance-NAME), or one that holds runs."
        )
    comparison = _json(folder / "comparison.json", problems, COMPARISON)
    tests = _json(folder / "tests.json", problems, TESTS_SHOWN).get("results", {})
    if kind == "comparison":
        runs = [_with_test(run, tests, _chosen(comparison)) for run in runs]
    return Study(
        title=folder.resolve().name,
        kind=kind if runs else "variance",
        runs=runs,
        comparison=comparison,
        variance=variance,
        problems=problems,
    )


def _variance(folder: Path, runs: list[Run], problems: list[str]) -> dict:
    """variance.json of the folder, or of the one beside it that `grade variance` makes for the same config."""
    places = [folder, *(folder.parent / f"variance-{run.config.get('name')}" for run in runs[:1])]
    found = next((found for place in places if (found := _json(place / "variance.json", problems, VARIANCE))), {})
    theirs = flatten(found.get("config", {}))
    shared = [name for name in ("model.name", "task.name") if name in theirs]
    other = runs and any(theirs[name] != runs[0].config.get(name) for name in shared)
    if other:
        problems.append("Measurements of `grade variance` beside the run are of another model or task: left out.")
    return {} if other else found


def _run_folders(folder: Path) -> list[Path]:
    return sorted(path.parent for path in folder.glob("*/config.yaml"))


# -- one run -------------------------------------------------------------------------------------------------


def _load_run(folder: Path, problems: list[str]) -> Run | None:
    try:
        found = plain_yaml(folder / "config.yaml")
        config: dict[str, Any] = {} if is_too_deep(found) else flatten(found)
        wrong = misfit(config, SETTINGS_SHOWN)
    except (GradeError, AttributeError, TypeError):
        wrong = "it is no file of settings"
    if wrong is not None:
        problems.append(f"{folder.name}/config.yaml is not that of a run: {wrong}.")
        return None
    seed, method = config["seed"], _method(folder.name, config)
    rows = _rows(folder / "metrics.jsonl", problems)
    evaluations = _json(folder / "evaluation.json", problems, EVALUATIONS_SHOWN)
    validation = [_flat_evaluation(row) for row in evaluations.get("validation") or []]
    test = evaluations.get("test", {})
    return Run(
        name=folder.name,
        method=method,
        seed=seed,
        config=config,
        record=_json(folder / "run.json", problems, RECORD),
        steps=[row for row in rows if "validation/reward" not in row],
        validation=validation or [_logged_evaluation(row) for row in rows if "validation/reward" in row],
        best=(evaluations.get("best") or {}).get("step"),
        base_test=_flat_evaluation(test["base"]) if "base" in test else None,
        test=_flat_evaluation(test["best"]) if "best" in test else None,
    )


def _method(name: str, config: dict[str, Any]) -> str:
    """The method's name in comparisons: as a comparison has named the folder, else by its settings."""
    base = str(config["method.name"])
    named = re.fullmatch(r"(.+?)-(seed|lr)[\d.e-]+", name)
    if named and named[1] in COMPARED and VARIANTS.get(named[1], (named[1],))[0] == base:
        return named[1]
    for variant, (of, changes) in VARIANTS.items():
        if of == base and all(config.get(f"method.{of}.{key}") == value for key, value in changes.items()):
            return variant
    return base


def _flat_evaluation(row: dict) -> dict:
    """Details, such as the solve rate, beside the other numbers."""
    return {**{key: value for key, value in row.items() if key != "details"}, **row.get("details", {})}


def _logged_evaluation(row: dict) -> dict:
    """A validation as metrics.jsonl has it: without samples."""
    return {"step": row["step"], **{key[len("validation/") :]: value for key, value in row.items() if "/" in key}}


def _rows(path: Path, problems: list[str]) -> list[dict]:
    """Rows of a log. The last line may be cut short: it is being written."""
    found = read_rows(path)
    rows, without = [], 0
    for row in found.rows:
        if misfit(row, {"step": COUNT}) is None:
            rows.append(row)
        else:
            without += 1
    if found.broken:
        problems.append(f"{path.parent.name}/{path.name}: left out what is not a row, line {found.broken[0]} first.")
    if without:
        problems.append(f"{path.parent.name}/{path.name}: left out {without} rows that name no step.")
    return sorted(rows, key=lambda row: row["step"])


def _json(path: Path, problems: list[str], shape: dict) -> dict:
    """The entries of a file that are what they should be; what is not is told, and so missing."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or is_too_deep(found):
        problems.append(f"{path.name} of {path.parent.name} cannot be read: left out.")
        return {}
    for name, part in shape.items():
        key = name.removesuffix("?")
        wrong = misfit(found[key], part, key) if key in found else None
        if wrong is not None and isinstance(part, list) and isinstance(found[key], list):
            problems.append(f"{path.name} of {path.parent.name}: {wrong}. What is so in {key} is left out.")
            found[key] = [entry for entry in found[key] if misfit(entry, part[0]) is None]
        elif wrong is not None:
            problems.append(f"{path.name} of {path.parent.name}: {wrong}. All of {key} is left out.")
            del found[key]
    return found


# -- what a comparison knows ---------------------------------------------------------------------------------


def _chosen(comparison: dict) -> dict[tuple[str, int], int]:
    """Step of the checkpoint that stands for a run at equal tokens, by (method, seed)."""
    rows = comparison.get("tables", {}).get("tokens", [])
    return {(row["method"], seed): step for row in rows for seed, step in zip(row["seeds"], row["best_steps"])}  # noqa: B905


def _with_test(run: Run, tests: dict[str, dict], chosen: dict[tuple[str, int], int]) -> Run:
    """The run with its checkpoint's result in tests.json, which the comparison chose; before it says which, the
    latest that is tested."""
    best = chosen.get((run.method, run.seed), run.best)
    prefix = f"{run.method}/{run.seed}/"
    tested = sorted(int(step) for key in tests if key.startswith(prefix) and (step := key[len(prefix) :]).isdecimal())
    if best != 0 and tested and best not in tested:
        best = tested[-1]
    # A comparison lets the base model stand for a run that had nothing trained within the budget.
    return replace(run, best=best, base_test=tests.get(BASE), test=tests.get(BASE if best == 0 else f"{prefix}{best}"))

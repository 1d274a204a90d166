"""Runs that differ in nothing but the seed, as one group: what every figure and table has one of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from grade.config import settings_with_role
from grade.config.methods import COMPARED, METHODS
from grade.report.data import Run

# Settings that leave a step of training what it is: how long a run lasts, how fast it is, where it lies, and these.
_FREE = {
    *settings_with_role("resume", "speed", "place"),
    "seed",
    "device",
    "evaluation.every",
    "evaluation.test_prompts",
}
SCHEDULE = ("method.tau_start", "method.tau_end", "method.tau_steps")


@dataclass(frozen=True)
class Group:
    """Runs of one method with the same settings, over seeds.

    Attributes:
        label: the method, with the settings that tell it from other groups of the method.
        rank: its place among the groups of its method.
    """

    label: str
    method: str
    rank: int
    runs: list[Run]

    def setting(self, name: str) -> Any:
        """Of its first run; None where its config has no such setting."""
        return self.runs[0].config.get(name)


def grouped(runs: Sequence[Run]) -> list[Group]:
    """Groups in the order of `COMPARED`; runs by seed."""
    methods = sorted({run.method for run in runs}, key=lambda m: (COMPARED.index(m) if m in COMPARED else 99, m))
    groups = []
    for method in methods:
        own = [run for run in runs if run.method == method]
        names = differing(own)
        for rank, values in enumerate(_distinct(own, names)):
            members = sorted((run for run in own if _values(run, names) == values), key=lambda run: run.seed)
            said = ", ".join(f"{short(name)} {plain(value)}" for name, value in zip(names, values, strict=True))
            groups.append(Group(f"{method} ({said})" if said else method, method, rank, members))
    return groups


def differing(runs: Sequence[Run]) -> list[str]:
    """Settings in which runs differ that are not `_FREE`, nor those of another method than their own, nor those that an
    earlier version did not have."""
    names = [name for name in runs[0].config if all(name in run.config for run in runs)]
    return [name for name in names if _counts(name, runs) and len(_distinct(runs, [name])) > 1]


def _counts(name: str, runs: Sequence[Run]) -> bool:
    section = name.split(".")[1] if name.count(".") == 2 else None
    if name.startswith("method.") and section in METHODS:
        return any(run.config["method.name"] == section for run in runs)
    return name not in _FREE


def _distinct(runs: Sequence[Run], names: Sequence[str]) -> list[list]:
    found: list[list] = []
    for run in runs:
        values = _values(run, names)
        if values not in found:
            found.append(values)
    return found


def _values(run: Run, names: Sequence[str]) -> list:
    return [run.config.get(name) for name in names]


def short(name: str) -> str:
    """The last part of a setting's name."""
    return name.rpartition(".")[2]


def plain(value: object) -> str:
    """A setting's value as people write it."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def settings_of(groups: Sequence[Group]) -> dict[str, list[str]]:
    """Settings in which groups differ, the method's own sections left out: name -> value by group."""
    runs = [group.runs[0] for group in groups]
    names = [name for name in differing(runs) if name.count(".") < 2 or not name.startswith("method.")]
    return {name: [plain(run.config.get(name)) for run in runs] for name in names if name != "method.name"}

"""Who made runs, when and with what: the sessions in their run.json, where there are any."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from grade.machine import machine_line
from grade.report.data import Run
from grade.tables import Cell


def sessions_of(run: Run) -> list[dict]:
    """A run's sessions, in order: its start, and every time that it went on."""
    found = run.record.get("sessions")
    return [session for session in found if isinstance(session, dict)] if isinstance(found, list) else []


def session_rows(runs: Sequence[Run]) -> list[list[Cell]]:
    """Run, start, end, steps before, command; of every session."""
    return [list(row) for run in runs for row in _rows(run)]


def _rows(run: Run) -> Iterator[tuple[Cell, ...]]:
    for session in sessions_of(run):
        ended = session.get("ended")
        step = session.get("after_step")
        yield (
            run.name,
            str(session.get("started")),
            "not recorded" if ended is None else str(ended),
            step if isinstance(step, int) else None,
            str(session.get("command")),
        )


def recorded(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Versions, commit of the code and machine of all sessions, each in words."""
    sessions = [session for run in runs for session in sessions_of(run)]
    described = {
        name: [session[name] for session in sessions if isinstance(session.get(name), dict)]
        for name in ("versions", "machine")
    }
    versions = [[f"{name} {number}" for name, number in found.items()] for found in described["versions"]]
    return {
        "versions": [", ".join(found) for found in versions],
        "git commit": [str(session["git_commit"]) for session in sessions if session.get("git_commit")],
        "machine": [machine_line(found).removeprefix("Machine: ") for found in described["machine"]],
    }

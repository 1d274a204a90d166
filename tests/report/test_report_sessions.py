"""The report says who made a run: of a fresh one, and of records that are older or damaged."""

from __future__ import annotations

import json

import pytest
from report_runs import write_run

pytest.importorskip("matplotlib")

from grade.report.data import load_study  # noqa: E402  matplotlib is an extra
from grade.report.sections import all_sections  # noqa: E402


def tables(folder):
    (summary, *_) = all_sections(load_study(folder))
    found = {part.title: part.rows for part in summary.parts if hasattr(part, "rows")}
    return dict(map(tuple, found["summary"])), found.get("sessions")


def test_a_fresh_run(trained_run):
    (session,) = json.loads((trained_run / "run.json").read_text())["sessions"]
    facts, rows = tables(trained_run)
    assert rows == [["run", session["started"], session["ended"], 0, session["command"]]]
    assert f"torch {session['versions']['torch']}" in facts["versions"]
    assert session["machine"]["cpu"] in facts["machine"]
    assert facts.get("git commit") == session["git_commit"]


def test_sessions_that_say_little(tmp_path):
    """A killed one has no end; what is no session, and a run without any, is left out."""
    folder = write_run(tmp_path / "run")
    facts, rows = tables(folder)
    assert rows is None and facts["machine"] == "not recorded" and "versions" not in facts
    sessions = [{"started": "then", "ended": None, "after_step": 0, "command": "grade train"}, "damaged", {}]
    (folder / "run.json").write_text(json.dumps({"sessions": sessions}))
    facts, rows = tables(folder)
    assert rows == [["run", "then", "not recorded", 0, "grade train"], ["run", "None", "not recorded", None, "None"]]
    assert facts["machine"] == "not recorded"

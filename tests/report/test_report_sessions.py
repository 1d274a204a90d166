"""The report says who made a run: of a fresh one, and of records that are older or damaged."""

from __future__ import annotations

import io
import json

import pytest
from report_runs import write_run
from rich.console import Console

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


def test_times_are_broken_nowhere(trained_run):
    (summary, *_) = all_sections(load_study(trained_run))
    table = next(part for part in summary.parts if getattr(part, "title", "") == "sessions")
    (session,) = json.loads((trained_run / "run.json").read_text())["sessions"]
    assert f'<td class="number">{session["ended"]}</td>' in table.html()
    console = Console(file=io.StringIO(), width=80)
    console.print(table.rich())
    assert session["started"] in console.file.getvalue() and session["ended"] in console.file.getvalue()


def test_kl_is_told_to_its_reference(tmp_path):
    def titles(*references):
        for i, reference in enumerate(references):
            write_run(tmp_path / str(references) / str(i), settings={"model.reference": reference})
        learning = next(s for s in all_sections(load_study(tmp_path / str(references))) if s.anchor == "learning")
        return " ".join(str(getattr(part, "caption", "")) for part in learning.parts)

    assert "KL to the base model over" in titles("base", "base")
    assert "KL to the policy as it started over" in titles("initial", "initial")
    assert "KL to each run's reference over" in titles("base", "initial")


def test_a_coefficient_that_moved_is_told_as_one(tmp_path):
    write_run(tmp_path / "0", method="ppo")
    write_run(tmp_path / "1", settings={"method.target_kl": 0.5})
    (summary, *sections) = all_sections(load_study(tmp_path))
    learning = next(s for s in sections if s.anchor == "learning")
    loss = next(part for part in learning.parts if getattr(part, "name", "") == "learning_loss")
    assert "each with its own kl_coef (grpo from 0.1, steered to a KL of 0.5)." in loss.caption
    assert ["which is steered to a KL of, nats", "0.5"] in summary.parts[0].rows


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

"""A disk that is full while a result is written: words that name the file and the setting, and what was kept stays."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from comparisons import METHODS, finish, results_of
from report_runs import write_run
from safetensors import SafetensorError

import grade.studies.compare.study
import grade.studies.variance.study
from grade.errors import GradeError
from grade.studies.compare import final_test
from grade.studies.compare.judge import Judge
from grade.studies.compare.study import run_comparison

FULL = Path("/dev/full")
NO_SPACE = r"could not be written \(No space left on device\)\. "


def no_space(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def full(monkeypatch):
    """Makes writing a text or bytes to files of that name fail as on a full disk."""

    def fill(name: str) -> None:
        for original in (Path.write_text, Path.write_bytes):

            def write(path, *args, original=original, **kwargs):
                if path.name == name:
                    path.touch()
                    no_space()
                return original(path, *args, **kwargs)

            monkeypatch.setattr(Path, original.__name__, write)

    return fill


@pytest.mark.parametrize("name", ["comparison.json", "comparison.md"])
def test_a_comparison(few, full, monkeypatch, name):
    finish(few, "reinforce"), finish(few, "ppo")
    full(name)
    if name == "comparison.json":
        monkeypatch.setattr(grade.studies.compare.study, "write_comparison", no_space)
    words = f"^output_dir: .*{name} {NO_SPACE}Make room on its disk: runs and tests are kept, and the same command"
    with pytest.raises(GradeError, match=words):
        run_comparison(few, METHODS, [0])


def test_test_results(few, no_models, tmp_path, monkeypatch):
    monkeypatch.setattr(final_test, "write_evaluations", no_space)
    with pytest.raises(GradeError, match=f"^output_dir: .*tests.json {NO_SPACE}.* the same command goes on"):
        results_of(few, tmp_path, {}, {})


@pytest.mark.parametrize("name", ["judge.json", "judge.safetensors"])
def test_the_judge(few, tmp_path, monkeypatch, name):
    def save(judge, path):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    reviews = [SimpleNamespace(label=i, text="a b") for i in (0, 1)]
    task = SimpleNamespace(examples={"judge": reviews, "test": []}.get)
    monkeypatch.setattr(final_test, "train_judge", lambda *_, **__: (Judge(), {"accuracy": {}}))
    if name == "judge.json":
        monkeypatch.setattr(final_test, "write_evaluations", no_space)
    else:
        monkeypatch.setattr(Judge, "save", save)
    with pytest.raises(GradeError, match=f"^output_dir: .*{name} could not be written .*No space left.* goes on"):
        final_test.load_judge(tmp_path, few, dict.fromkeys(["tokenizer", "judge", "data"], "x"), None, task)
    assert not (tmp_path / "judge.json").exists()  # nothing says that those weights are whole


@pytest.mark.parametrize("name", ["variance.json", "variance.md"])
def test_measurements(lab_config, full, monkeypatch, name):
    monkeypatch.setattr(grade.studies.variance.study, "_measured", lambda *_: [])
    full(name)
    if name == "variance.json":
        monkeypatch.setattr(grade.studies.variance.study, "write_evaluations", no_space)
    with pytest.raises(GradeError, match=f"^output_dir: .*variance.json {NO_SPACE}.* is kept there"):
        grade.studies.variance.study.run_variance(lab_config)


@pytest.mark.parametrize("written", ["index.html.new", "summary.csv.new", "runs.tex.new"])
def test_a_report(full, tmp_path, monkeypatch, written):
    pytest.importorskip("matplotlib")
    from grade.report.page import write_page
    from grade.report.parts import Section
    from grade.tables import Column, Table

    tables = [Table(name, [Column("a")], [["x"]]) for name in ("summary", "runs")]
    page = write_page("before", [Section("s", "S", tables)], tmp_path)
    full(written)
    with pytest.raises(GradeError, match=rf"^--output: .*{written[:-4]} could not be written \(No space left"):
        write_page("after", [Section("s", "S", tables)], tmp_path)
    assert "before" in page.read_text() and not list(tmp_path.rglob("*.new"))  # the earlier page is whole


def test_a_figure(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from grade.commands.report import run_report
    from grade.report import page

    monkeypatch.setattr(page, "save", no_space)
    with pytest.raises(GradeError, match=r"^--output: .*figures/\w+ could not be written \(No space left on device\)"):
        run_report(write_run(tmp_path / "run"))


@pytest.mark.skipif(not FULL.is_char_device(), reason="there is no /dev/full here")
@pytest.mark.parametrize("argv", [["doctor"], ["doctor", "--json"], ["train", "--help"]], ids=" ".join)
def test_standard_output(argv):
    with FULL.open("w") as out:
        done = subprocess.run(
            [sys.executable, "-m", "grade", *argv], stdout=out, stderr=subprocess.PIPE, text=True, timeout=120
        )
    assert done.stderr == (
        "grade: error: standard output could not be written (No space left on device): make room where it goes.\n"
    )
    assert done.returncode == 2


def test_a_reader_that_has_gone_is_no_error():
    done = subprocess.run(
        f"{sys.executable} -m grade doctor --json | head -c 1; exit ${{PIPESTATUS[0]}}",
        shell=True,
        executable="/bin/bash",
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.stdout, done.stderr, done.returncode) == ("{", "", 0)

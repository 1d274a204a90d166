"""JSON lines: what is text stays in its row, and what was cut short is told from what is damaged."""

import json
from dataclasses import replace

import pytest
from report_runs import write_run

from benchmarks import seeds
from grade.config import Config
from grade.errors import GradeError
from grade.jsonl import Rows, append_rows, encode_rows, read_rows
from grade.report.data import load_study
from grade.studies.compare import comparison
from grade.studies.compare.jobs import Job, _why_it_failed

SEPARATORS = ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\r", "\n", "\r\n"]


@pytest.mark.parametrize("separator", SEPARATORS, ids=[repr(s) for s in SEPARATORS])
def test_a_text_with_any_line_separator_is_one_row(tmp_path, separator):
    rows = [{"step": i, "response": f"one{separator}two"} for i in range(8)]
    path = tmp_path / "samples.jsonl"
    append_rows(path, rows[:3])
    append_rows(path, rows[3:])
    assert read_rows(path) == Rows(rows, [], False)
    assert path.read_bytes().count(b"\n") == 8


@pytest.mark.parametrize("text", ["\ud83d", "a\udfff!", "😀", "\x00", "\\ud800", "ü漢ع"])
def test_any_text_is_read_back_as_it_was(tmp_path, text):
    append_rows(tmp_path / "samples.jsonl", [{"text": text, text: 1}])
    assert read_rows(tmp_path / "samples.jsonl").rows == [{"text": text, text: 1}]


def test_a_missing_and_an_empty_file_have_no_rows(tmp_path):
    assert read_rows(tmp_path / "none.jsonl") == Rows([], [], False)
    (tmp_path / "empty.jsonl").touch()
    assert read_rows(tmp_path / "empty.jsonl") == Rows([], [], False)


def test_a_cut_last_line_is_told_from_broken_ones(tmp_path):
    path, whole = tmp_path / "metrics.jsonl", encode_rows([{"step": 0}, {"text": "ü"}])
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        found = read_rows(path)
        assert found.rows == [
            json.loads(line) for line in (b'{"step": 0}', '{"text": "ü"}'.encode()) if whole[:cut].find(line) >= 0
        ]
        # A row that lacks only its line's end is whole.
        assert found.broken == [] and found.cut == (cut not in (0, 11, 12, len(whole) - 1, len(whole)))
    path.write_bytes(b'{"step": 0}\n{"st\n[1]\n7\n\n\xff\n' + b"[" * 200_000 + b'\n{"step": 1}\n{"st\n')
    assert read_rows(path) == Rows([{"step": 0}, {"step": 1}], [2, 3, 4, 5, 6, 7], True)


def test_a_file_that_cannot_be_read_is_told_in_words(tmp_path):
    with pytest.raises(GradeError, match="metrics.jsonl cannot be read"):
        (tmp_path / "metrics.jsonl").mkdir()
        read_rows(tmp_path / "metrics.jsonl")


@pytest.mark.parametrize("separator", SEPARATORS, ids=[repr(s) for s in SEPARATORS])
def test_every_reader_of_logs_keeps_the_row_whole(tmp_path, separator):
    """A text in a row, written as the trainer writes it: not escaped."""
    folder = write_run(tmp_path / "run")
    log = folder / "metrics.jsonl"
    rows = [{**row, "note": f"a{separator}b"} for row in read_rows(log).rows]
    log.write_bytes(encode_rows(rows))
    study = load_study(folder)
    assert len(study.runs[0].steps) == 4 and study.problems == []
    assert [row["note"] for row in study.runs[0].steps] == [f"a{separator}b"] * 4
    assert len(comparison._rows(folder)) == len(rows) == len(seeds_rows(folder))


def seeds_rows(folder):
    """The steps that benchmarks.seeds reads, and the validations it leaves out."""
    found = seeds.read_run(folder)
    return found["step_seconds"] + [None] * 3


def test_the_reason_of_a_failed_run_is_its_whole_line(tmp_path):
    job = Job("ppo", replace(Config(), train=replace(Config().train, run_dir=str(tmp_path / "ppo"))))
    job.log.write_text("step 1\rstep 2\rgrade: error: the text 'a\u2028b\x85c' is odd.\n\n", encoding="utf-8")
    assert _why_it_failed(job, 2) == "grade: error: the text 'a\u2028b\x85c' is odd."

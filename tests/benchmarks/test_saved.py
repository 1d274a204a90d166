"""What benchmarks keep with --save and show with --table: every file and place that is none is refused in words."""

from __future__ import annotations

import argparse
import errno
import json

import pytest

from benchmarks import saved

MEASURED = {"rows": [{"name": "a", "value": 1.0}]}


def document(found: dict) -> str:
    return "".join(f"{row['name']} {row['value']:.1f}\n" for row in found["rows"])


def run(*arguments: str, measure=lambda options: MEASURED) -> None:
    saved.command(
        argparse.ArgumentParser(), list(map(str, arguments)), measure, document, "rows", of_rows=("name", "value")
    )


def test_what_was_kept_is_shown(tmp_path, capsys):
    run("--save", tmp_path / "x.json")
    run("--table", tmp_path / "x.json")
    assert capsys.readouterr().out == 2 * "a 1.0\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "cannot be read"),
        ("\x00\x01", "cannot be read"),
        ("[]", "no JSON object"),
        ("{}", "no entry 'rows'"),
        ('{"rows": null}', "no list of objects"),
        ('{"rows": [3]}', "no list of objects"),
        ('{"rows": []}', "no rows"),
        ('{"rows": [{"name": "a"}]}', "another command's"),
        ('{"rows": [{"name": "a", "value": null}]}', "is damaged, or of another version"),
        ('{"rows": [{"name": "a", "value": "x"}]}', "is damaged, or of another version"),
    ],
)
def test_a_file_that_is_none_is_refused(tmp_path, text, words):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(SystemExit, match=words) as refused:
        run("--table", tmp_path / "x.json")
    assert str(tmp_path / "x.json") in str(refused.value)


def test_what_cannot_be_kept_after_all_is_shown(tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(saved, "replace_text", full)
    with pytest.raises(SystemExit, match=r"--save .*x\.json could not be written \(.*No space left on device\)"):
        run("--save", tmp_path / "x.json")
    text, kept = capsys.readouterr().out.splitlines()
    assert text == "a 1.0" and json.loads(kept) == MEASURED


@pytest.mark.parametrize(("place", "words"), [("", "it is a folder"), ("nowhere/x.json", "its folder does not exist")])
def test_a_place_that_cannot_be_written_is_refused_before_anything_is_measured(tmp_path, place, words):
    def measure(options):
        raise AssertionError("measured")

    with pytest.raises(SystemExit, match=f"--save .* cannot be written: {words}"):
        run("--save", tmp_path / place, measure=measure)


@pytest.mark.parametrize("text", ["-1", "nan", "inf", "x", ""])
def test_a_number_out_of_bounds_is_refused(text):
    for kind in (int, float):
        with pytest.raises(argparse.ArgumentTypeError, match="number from 0 on, got"):
            saved.number(kind, 0)(text)
    with pytest.raises(argparse.ArgumentTypeError, match="a number above 0, got"):
        saved.number(float, 0, above=True)("0")
    assert json.dumps([saved.number(int, 0)("3"), saved.number(float, 0)("0.5")]) == "[3, 0.5]"

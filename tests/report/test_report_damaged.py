"""A report of damaged files: it says what it leaves out, or refuses in words."""

from __future__ import annotations

import json
import random
import re

import pytest
from report_runs import VARIANCE, add_frontier, write_comparison

pytest.importorskip("matplotlib")

from benchmarks.damage import damage  # noqa: E402  matplotlib is an extra
from grade.errors import GradeError  # noqa: E402
from grade.report.data import load_study  # noqa: E402
from grade.report.parts import Html  # noqa: E402
from grade.report.sections import all_sections  # noqa: E402
from grade.tables import Table  # noqa: E402


def comparison(folder):
    write_comparison(folder / "compare-x", {"grade-ste": [0.8], "ppo": [0.6, 0.61]})
    add_frontier(folder / "compare-x")
    (folder / "compare-x" / "variance.json").write_text(json.dumps(VARIANCE), encoding="utf-8")
    return folder / "compare-x"


def read(folder) -> list[str]:
    """Everything that a page would show, but for the files of its figures; the problems that it names."""
    study = load_study(folder)
    for section in all_sections(study):
        for part in section.parts:
            table = part.table if isinstance(part, Html) else part
            if isinstance(table, Table):
                assert table.html() and table.csv() and table.latex()
    return study.problems


@pytest.mark.parametrize("seed", [*range(9), 18])
def test_any_damage_is_told_or_harmless(tmp_path, seed):
    folder, chance = comparison(tmp_path), random.Random(seed)
    names = ("comparison.json", "comparison.json", "tests.json", "variance.json", "ppo-seed0/evaluation.json")
    names += ("ppo-seed0/metrics.jsonl", "ppo-seed0/run.json", "ppo-seed1/config.yaml")
    done = damage(folder / chance.choice(names), chance)
    try:
        read(folder)
    except GradeError as error:
        assert str(folder) in str(error), done


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("ppo-seed0/evaluation.json", {"validation": [], "test": None}, "test is null, not an object"),
        ("ppo-seed0/evaluation.json", {"best": [1]}, "best is a list, not an object"),
        ("ppo-seed0/evaluation.json", {"validation": [{"step": -5}]}, r"validation\[0\].step is -5, not a whole"),
        ("ppo-seed0/evaluation.json", {"validation": [{"step": 0, "details": 3}]}, r"validation\[0\].details is 3"),
        ("ppo-seed0/run.json", {"inputs": {}, "sessions": {"a": 1}}, "sessions is an object, not a list"),
        ("tests.json", {"results": [1]}, "results is a list, not an object"),
        ("comparison.json", {"tables": {"tokens": [{"method": "ppo"}]}}, r"tables.tokens\[0\] has no entry 'seeds'"),
        ("comparison.json", {"failures": "all"}, "failures is 'all', not an object"),
        ("comparison.json", {"frontier": {"points": []}}, "frontier has no entry 'prompts'"),
        ("variance.json", {"rows": [{"method": "ppo"}]}, r"rows\[0\] has no entry 'estimator'"),
    ],
)
def test_what_is_left_out_is_named(tmp_path, name, content, said):
    folder = comparison(tmp_path)
    (folder / name).write_text(json.dumps(content), encoding="utf-8")
    problems = read(folder)
    assert any(re.search(said, problem) for problem in problems), problems


def test_a_log_that_is_a_folder_is_refused(tmp_path):
    folder = comparison(tmp_path)
    (folder / "ppo-seed0" / "metrics.jsonl").unlink()
    (folder / "ppo-seed0" / "metrics.jsonl").mkdir()
    with pytest.raises(GradeError, match="metrics.jsonl cannot be read"):
        read(folder)


def test_steps_and_numbers_that_cannot_be_are_left_out(tmp_path):
    folder = comparison(tmp_path)
    path = folder / "ppo-seed0" / "metrics.jsonl"
    rows = ['{"step": -5, "reward": 1}', f'{{"step": {10**30}, "reward": 1}}', f'{{"step": 1, "reward": {10**400}}}']
    path.write_text(path.read_text() + "\n".join(rows) + "\n")
    assert any("left out 2 rows that name no step" in problem for problem in read(folder))

"""What `python -m benchmarks.kernel_counts` has saved is what the kernels take now."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.kernel_counts import cases, main
from grade_kernels.aot import binary
from grade_kernels.aot.command import configuration
from grade_kernels.aot.table import record
from grade_kernels.common.environment import check_triton, interpreting

SAVED = json.loads((Path(__file__).parents[2] / "benchmarks/results/kernel_counts.json").read_text(encoding="utf-8"))
TARGET = "sm_90"


def saved_rows(version: str) -> dict[str, dict]:
    return {row["name"]: row for row in SAVED["rows"] if row["triton"] == version and row["target"] == TARGET}


def test_saved_rows_are_of_all_cases():
    names = {name for name, _ in cases()}
    versions = {row["triton"] for row in SAVED["rows"]}
    assert len(SAVED["rows"]) == len(versions) * len(names) * len(binary.TARGETS)
    assert all(saved_rows(version).keys() == names for version in versions)


@pytest.mark.parametrize("name", ["KL of two rows", "log-probability, entropy", "its first read, few rows"])
def test_counts_are_those_of_the_kernels(name):
    """Those that compile in about a second. Others are a table to be written anew:
    python -m benchmarks.kernel_counts --save benchmarks/results/kernel_counts.json"""
    try:
        check_triton()
    except RuntimeError as error:
        pytest.skip(str(error))
    import triton

    saved = saved_rows(triton.__version__)
    if interpreting() or not saved:
        pytest.skip("needs Triton's compiler, of a version that was counted")
    row = binary.compile_one(configuration(dict(cases())[name], TARGET))
    found = record(row, triton.__version__)
    for number in ("registers", "issue_per_element", "load_bytes_per_element", "shuffles", "barriers", "error"):
        assert found[number] == saved[name][number], number


@pytest.mark.parametrize("jobs", ["0", "-1", "x"])
def test_a_number_of_processes_that_is_none_is_refused(jobs, tmp_path, capsys):
    """Before what the file holds of this version is dropped for nothing."""
    kept = tmp_path / "kept.json"
    kept.write_text(json.dumps(SAVED), encoding="utf-8")
    with pytest.raises(SystemExit):
        main(["--jobs", jobs, "--save", str(kept)])
    assert "must be a whole number from 1 on" in capsys.readouterr().err
    assert json.loads(kept.read_text(encoding="utf-8")) == SAVED

"""Runs that are killed twice, the second time while they recover, end as one that was left alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_runs_killed_twice_end_as_the_undisturbed_one():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.kills", "--kills", "3"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0 and "3 of 3 runs" in done.stdout, done.stdout + done.stderr

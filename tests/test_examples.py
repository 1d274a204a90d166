"""The programs in examples/ run as a person runs them, with a model of a few steps in the place of the built-in one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs_and_its_reward_rises(name, tiny_model, tmp_path):
    environment = {**os.environ, "MODEL": str(tiny_model), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / name), *([] if name == "kernels_alone.py" else ["run"])],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    before, after = re.search(r"(-?\d+\.\d+) before, (-?\d+\.\d+) after", done.stdout).groups()
    assert float(after) > float(before)
    assert name == "kernels_alone.py" or (tmp_path / "run" / "checkpoints" / "best").is_dir()

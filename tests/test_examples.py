"""The programs in examples/ run as a person runs them, with a model of a few steps in the place of the built-in one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from forked import forked

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs_and_its_reward_rises(name, tiny_model, tmp_path):
    program = [ROOT / "examples" / name, *([] if name == "kernels_alone.py" else ["run"])]
    ((code, said, errors),) = forked([(program, {"MODEL": str(tiny_model)})], cwd=tmp_path, timeout=300)
    assert code == 0, errors
    before, after = re.search(r"(-?\d+\.\d+) before, (-?\d+\.\d+) after", said).groups()
    assert float(after) > float(before)
    assert name == "kernels_alone.py" or (tmp_path / "run" / "checkpoints" / "best").is_dir()

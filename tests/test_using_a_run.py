"""The Python of docs/using_a_run.md works on what its commands write."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from grade import cli

PAGE = (Path(__file__).parents[1] / "docs" / "using_a_run.md").read_text(encoding="utf-8")


def test_the_examples_run_on_what_the_commands_write(trained_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    commands = [line.split("#")[0].split() for line in PAGE.split("\n") if line.startswith("grade export")]
    assert len(commands) == 2
    for command in commands:
        assert cli.main([str(trained_run) if word == "runs/demo-seed0" else word for word in command[1:]]) == 0
    code = "\n".join(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL))
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0 and "The film was" in done.stdout, done.stderr

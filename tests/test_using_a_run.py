"""The Python of docs/using_a_run.md works on what its commands write."""

from __future__ import annotations

import re
from pathlib import Path

from forked import forked

from grade import cli

PAGE = (Path(__file__).parents[1] / "docs" / "using_a_run.md").read_text(encoding="utf-8")


def test_the_examples_run_on_what_the_commands_write(trained_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    commands = [line.split("#")[0].split() for line in PAGE.split("\n") if line.startswith("grade export")]
    assert len(commands) == 2
    for command in commands:
        assert cli.main([str(trained_run) if word == "runs/demo-seed0" else word for word in command[1:]]) == 0
    code = "\n".join(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL))
    (tmp_path / "program.py").write_text(code, encoding="utf-8")
    ((status, said, errors),) = forked([([tmp_path / "program.py"], {})], cwd=tmp_path, timeout=200)
    assert status == 0 and "The film was" in said, errors

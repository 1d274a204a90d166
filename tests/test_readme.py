"""The README's Python is run as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import grade_kernels

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("code", EXAMPLES, ids=[re.findall(r"\w+(?=\()", code)[0] for code in EXAMPLES])
def test_example(code, capsys):
    assert len(code.splitlines()) <= 12
    exec(compile(code, "README.md", "exec"), {})
    assert "nan" not in capsys.readouterr().out


def test_every_operation_has_an_example():
    text = "\n".join(EXAMPLES)
    operations = [name for name in grade_kernels.__all__ if name[0].islower()]
    helpers = {"backend_for", "candidate_grad", "chunk_rows", "place_tokens", "pull_back"}
    missing = [name for name in operations if name not in helpers and f"{name}(" not in text]
    assert not missing

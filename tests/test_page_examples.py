"""What stands in code blocks of README.md and docs/ works: Python is run, `grade` commands are read.

The Python of docs/using_a_run.md reads what its commands have written: tests/test_using_a_run.py runs both.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

import grade_kernels
from grade.cli import run
from grade.commands.verbs import COMMANDS

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
BLOCKS = [
    (path.relative_to(ROOT).as_posix(), language, code)
    for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md")))
    for language, code in BLOCK.findall(path.read_text(encoding="utf-8"))
]
EXAMPLES = [(page, code) for page, language, code in BLOCKS if language == "python" and page != "docs/using_a_run.md"]
LINES = [
    (page, shlex.split(line, comments=True))
    for page, language, code in BLOCKS
    if language in ("", "bash")
    for line in code.replace("\\\n", " ").splitlines()
    if re.search(r"(^| )grade [a-z]+ ", line)
]
COMMAND_LINES = [(page, words[words.index("grade") + 1 :]) for page, words in LINES]
OF_A_FOLDER = ("evaluate", "generate", "export", "push", "report")
"""Commands whose argument is the folder of a run, which is not there: their options are looked up in their help."""


@pytest.mark.parametrize(("page", "code"), EXAMPLES, ids=[re.findall(r"\w+(?=\()", code)[0] for _, code in EXAMPLES])
def test_python(page, code, capsys, tiny_model, monkeypatch):
    monkeypatch.setattr("grade.model.loading.demo_model", lambda: tiny_model)  # after a few steps: a minute less
    assert sum(bool(line.strip()) for line in code.splitlines()) <= 12
    exec(compile(code, page, "exec"), {})
    assert "nan" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("page", "arguments"), COMMAND_LINES, ids=[" ".join(arguments[:2]) for _, arguments in COMMAND_LINES]
)
def test_command_line(page, arguments, capsys):
    command, *rest = arguments
    assert command in COMMANDS
    if command in OF_A_FOLDER:
        assert run([command, "--help"]) == 0
        options = re.findall(r"--[\w.]+", capsys.readouterr().out)
        assert rest and not rest[0].startswith("-")
        assert {word.partition("=")[0] for word in rest if word.startswith("--")} <= set(options)
    elif command != "doctor":
        assert run([*arguments, "--print_config"]) == 0


def test_every_operation_has_an_example():
    text = "\n".join(code for _, code in EXAMPLES)
    operations = [name for name in grade_kernels.__all__ if name[0].islower()]
    helpers = {"candidate_grad", "chunk_rows", "place_tokens", "pull_back", "backend_for"}
    assert not [name for name in operations if name not in helpers and f"{name}(" not in text]

"""Every test that docs/guarantees.md names exists, and every promise names one."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "guarantees.md").read_text(encoding="utf-8")


def names_in(path: Path) -> set[str]:
    return {
        node.name
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def test_every_test_that_the_page_names_exists():
    named = set(re.findall(r"`(test_\w+)`", PAGE))
    known = set().union(*(names_in(path) for path in (ROOT / "tests").rglob("test_*.py")))
    assert len(named) > 50 and named <= known, sorted(named - known)


def test_every_promise_has_a_test_or_a_command():
    rows = [line for line in PAGE.splitlines() if line.startswith("| ") and not line.startswith("| promise")]
    assert len(rows) > 25
    for row in rows:
        *_, held, _ = row.split(" |")
        assert re.search(r"`(test_\w+|tests/\S+|python -m \S+)", held), row

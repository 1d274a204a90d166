"""The pages' numbers are those that their commands print."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import pages

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("page", pages.PAGES)
def test_a_page_says_what_its_commands_print(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = (ROOT / page).read_text(encoding="utf-8")
    assert "<!-- python -m" in text
    assert pages.written(text) == text


def test_a_changed_number_is_found_and_written_back(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    command = "<!-- python -m benchmarks.seeds benchmarks/results/imdb_small.json | rows 1-2 -->"
    page = tmp_path / "page.md"
    page.write_text(f"before\n{command}\n\n| 0.999 |\n\n<!-- end -->\nafter\n")
    with pytest.raises(SystemExit, match="Not what the commands print"):
        pages.main(["--check", str(page)])
    assert "0.999" in page.read_text()
    pages.main([str(page)])
    text = page.read_text()
    assert "0.999" not in text and text.startswith("before\n") and text.endswith("<!-- end -->\nafter\n")
    assert len([line for line in text.splitlines() if line.startswith("|")]) == 2
    pages.main(["--check", str(page)])


def test_a_block_without_an_end_is_refused():
    with pytest.raises(ValueError, match="has no <!-- end -->"):
        pages.written("<!-- python -m benchmarks.seeds file -->\n1\n")

"""What a page says is so: numbers are those that its commands print; links, paths and settings exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks import pages
from grade import __version__
from grade.config.names import setting_types

ROOT = Path(__file__).parents[1]
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in pages.pages_in(ROOT)}
SETTINGS = setting_types()
SECTIONS = "|".join(sorted({name.partition(".")[0] for name in SETTINGS if "." in name}))
FOLDERS = "|".join(("benchmarks", "docs", "grade", "grade_kernels", "tests", r"\.github"))


def code_of(page: str) -> list[str]:
    """The words in code, in a line or in a block."""
    text = TEXTS[page]
    blocks = re.findall(r"^ *```.*?\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)
    spans = re.findall(r"`([^`]+)`", re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL))
    return [word for part in (*blocks, *spans) for word in part.split()]


def anchors(text: str) -> set[str]:
    """What GitHub makes of the headings."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [page for page, text in TEXTS.items() if "<!-- python -m" in text])
def test_a_page_says_what_its_commands_print(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert pages.written(TEXTS[page]) == TEXTS[page]


def test_the_pages_with_results_are_written_by_commands():
    assert all("<!-- python -m" in TEXTS[page] for page in ("README.md", "docs/results.md"))


@pytest.mark.parametrize("page", TEXTS)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", TEXTS[page]):
        if re.match(r"\w+:", target):
            continue
        file, _, anchor = target.partition("#")
        there = ((ROOT / page).parent / file).resolve() if file else ROOT / page
        assert there.exists(), target
        assert not anchor or anchor in anchors(there.read_text(encoding="utf-8")), target


@pytest.mark.parametrize("page", TEXTS)
def test_paths_exist(page):
    """A pattern stands for its files, and so does a name to which a command adds endings."""
    named = [word.strip(".,;:()[]'\"") for word in code_of(page)]
    named = [word for word in named if re.match(rf"({FOLDERS})/", word)]
    assert not [word for word in named if not any(ROOT.glob(word)) and not any(ROOT.glob(f"{word}.*"))]


@pytest.mark.parametrize("page", TEXTS)
def test_settings_exist(page):
    """`section.field`, or with a star at its end some of them."""
    named = {word.strip(",:").removeprefix("--").partition("=")[0] for word in code_of(page)}
    named = {word for word in named if re.fullmatch(rf"({SECTIONS})(\.[a-z_0-9]+)+(\.?\*)?", word)}
    files = {word for word in named if re.search(r"\.(py|json|jsonl|yaml|md|safetensors)$", word)}
    sections = {name.rpartition(".")[0] for name in SETTINGS}
    unknown = [
        word
        for word in named - files - sections
        if not any(name == word or word.endswith("*") and name.startswith(word[:-1]) for name in SETTINGS)
    ]
    assert not unknown


def test_every_setting_of_a_method_is_on_its_pages():
    told = {word for page in TEXTS if page.startswith("docs/methods/") for word in code_of(page)}
    assert {name for name in SETTINGS if name.startswith("method.")} <= told


def test_readme_is_short_and_names_every_folder_of_the_packages():
    assert len(TEXTS["README.md"].splitlines()) <= 150
    folders = {path.parent for package in ("grade", "grade_kernels") for path in ROOT.glob(f"{package}/*/__init__.py")}
    tree = {word.rstrip("/") for word in code_of("README.md")}
    assert not {folder.relative_to(ROOT).as_posix() for folder in folders} - tree


def test_the_version_is_that_of_the_package():
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.findall(r"^## \[(.*?)\]", TEXTS["CHANGELOG.md"], re.MULTILINE)[0] in (__version__, "Unreleased")


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

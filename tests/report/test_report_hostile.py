"""The report of runs whose names, settings and samples would break what shows them."""

from __future__ import annotations

import csv
import io
import re
import shutil
import subprocess
import unicodedata
import warnings
from html import unescape

import pytest
from hostile import METHODS, TEXTS, write_hostile

pytest.importorskip("matplotlib")

from grade.commands.report import run_report  # noqa: E402  matplotlib is an extra
from grade.latex import LONGEST, latex  # noqa: E402
from grade.report.figures_bars import bars  # noqa: E402
from grade.report.style import _SETTINGS, add_legend, drawn, new_axes, save  # noqa: E402
from grade.tables import Column, Estimate, Table  # noqa: E402

PDFLATEX = shutil.which("pdflatex")
ENGINES = ["pdflatex", "xelatex", "lualatex"]
needs_latex = pytest.mark.skipif(
    PDFLATEX is None or subprocess.run(["kpsewhich", "booktabs.sty"], capture_output=True).returncode != 0,
    reason="needs LaTeX (apt-get install texlive-latex-base texlive-latex-recommended)",
)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = write_hostile(tmp_path_factory.mktemp("hostile") / r"$\frac{$ <i> runs")
    patch = pytest.MonkeyPatch()
    patch.setitem(_SETTINGS, "pdf.fonttype", 3)  # quicker
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield run_report(folder)
    patch.undo()


def compiles(folder, body: str, engine: str = "pdflatex") -> None:
    """A document compiles without an error, reads nothing of its own choice and starts no program."""
    (folder / "main.tex").write_text(
        "\\documentclass{article}\\usepackage{booktabs,longtable}\\begin{document}\n" + body + "\n\\end{document}\n",
        encoding="utf-8",
    )
    options = ["-interaction=nonstopmode", "-halt-on-error", "-no-shell-escape", "-recorder"]
    done = subprocess.run(
        [engine, *options, "main.tex"], cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, timeout=120
    )
    log = (folder / "main.log").read_text(encoding="utf-8", errors="replace")
    assert done.returncode == 0, re.findall(r"^!.*\n.*\n.*", log, re.MULTILINE)[:3]
    assert (folder / "main.pdf").stat().st_size > 0 and "Missing character" not in log
    assert "passwd" not in (folder / "main.fls").read_text(encoding="utf-8") and not (folder / "owned").exists()


# --- LaTeX -------------------------------------------------------------------------------------------------


@needs_latex
def test_every_table_of_a_hostile_report_compiles(page, tmp_path):
    tables = sorted((page.parent / "tables").glob("*.tex"))
    assert len(tables) > 5 and any(table.name == "samples.tex" for table in tables)
    for table in tables:
        shutil.copy(table, tmp_path)
    compiles(tmp_path, "\n".join(f"\\clearpage\\noindent\\input{{{table.stem}}}" for table in tables))


@needs_latex
@pytest.mark.parametrize("engine", ENGINES)
def test_each_text_compiles_wherever_it_stands(tmp_path, engine):
    """In a paragraph and in a line, first and last in a row, in a title and in the caption."""
    if shutil.which(engine) is None:
        pytest.skip(f"needs {engine}")
    for number, text in enumerate(TEXTS.values()):
        table = Table("t", [Column(text[:30]), Column("b")], [[text[:30], text], [text, text[:30]], ["x", "y"]], text)
        (tmp_path / f"t{number}.tex").write_bytes(table.latex().encode("utf-8"))
    compiles(tmp_path, "\n".join(f"\\clearpage\\noindent\\input{{t{number}}}" for number in range(len(TEXTS))), engine)


@needs_latex
@pytest.mark.parametrize("engine", ENGINES)
def test_all_characters_that_stand_as_they_are(tmp_path, engine):
    if shutil.which(engine) is None:
        pytest.skip(f"needs {engine}")
    if engine == "lualatex" and subprocess.run(["kpsewhich", "luaotfload-main.lua"], capture_output=True).returncode:
        pytest.skip("needs the fonts of lualatex (apt-get install texlive-luatex)")
    characters = [chr(i) for i in range(0x20, 0x3000) if unicodedata.category(chr(i)) != "Cn"]
    table = Table(
        "t",
        [Column("a"), Column("b")],
        [["x", "".join(characters[i : i + 300])] for i in range(0, len(characters), 300)],
    )
    (tmp_path / "t.tex").write_bytes(table.latex().encode("utf-8"))
    compiles(tmp_path, "\\noindent\\input{t}", engine)


@needs_latex
def test_a_document_with_the_font_shows_the_character(tmp_path):
    """The definition gives way to one that the document made before."""
    (tmp_path / "t.tex").write_text(Table("t", [Column("a")], [["τ漢"]]).latex(), encoding="utf-8")
    compiles(tmp_path, "\\newcommand{\\othercharacter}[2]{(#2)}\\input{t}")


def test_other_scripts_keep_their_characters_and_code_points():
    assert latex("a漢") == r"a\othercharacter{漢}{6F22}" and latex("\x07") == r"\othercharacter{}{0007}"
    assert latex("\ud800") == r"\othercharacter{}{D800}" and latex("ü – τ") == r"ü -- $\tau$"
    assert latex("a\u2028b\nc\x0bd") == "a b c d" and latex("--- ``") == r"-{}-{}- \textasciigrave{}\textasciigrave{}"
    assert latex("x" * 50).count(r"\allowbreak{}") == 2 and latex("word " * 20).count("allowbreak") == 0
    assert len(latex("y" * 9000).replace(r"\allowbreak{}", "")) == LONGEST + len(r" \dots{}")


def test_what_is_longer_than_a_page_goes_on_over_pages():
    short, many = (Table("t", [Column("a"), Column("b", 1)], [["x" * 50, 1.0]] * n).latex() for n in (3, 60))
    assert r"\begin{tabular}{p{0.25\textwidth}r}" in short and "longtable" not in short
    assert r"\begin{longtable}{p{0.25\textwidth}r}" in many and many.startswith("% needs \\usepackage{booktabs} and")


# --- CSV ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠"])
def test_a_spreadsheet_runs_no_text(start):
    text = f"{start}1+cmd|'/C calc'!A0"
    table = Table("t", [Column(text), Column("n")], [[text, -1], ["-0.5", -0.25], ["a=b", Estimate(-1.0, 0.5, 2)]])
    rows = list(csv.reader(io.StringIO(table.csv(), newline="")))
    assert rows[0][0] == rows[1][0] == "'" + text.replace("\r", "\n")
    assert rows[1][1] == "-1" and rows[2][:2] == ["-0.5", "-0.25"] and rows[3] == ["a=b", "-1.0", "0.5"]


def test_the_tables_of_a_hostile_report_hold_no_formula(page):
    for path in (page.parent / "tables").glob("*.csv"):
        for row in csv.reader(io.StringIO(path.read_bytes().decode(), newline="")):
            for cell in row:
                assert not re.match(r"[=+\-@\t\r\n](?!\d+(\.\d+)?(e[+-]\d+)?$)", cell), (path.name, cell[:40])
    texts = (page.parent / "tables" / "samples.csv").read_text(encoding="utf-8")
    assert "'=HYPERLINK" in texts and "W" * 3000 in texts and "漢" * 5000 in texts


# --- figures and page --------------------------------------------------------------------------------------


def test_any_text_can_be_drawn(tmp_path):
    texts = [*TEXTS.values(), *METHODS, r"\$", r"a\\$b", "$$", "$", "a $b$ c"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        labels = [*texts, *(f"x ({text})" for text in texts)]
        nothing = [None] * len(labels)
        save(bars(labels, ["#888888"] * len(labels), {"a": nothing, METHODS[0]: nothing}, "", ""), tmp_path, "all")
        for text in texts:
            figure, axes = new_axes(text, text, text)
            axes.plot([1, 2], [1, 2], label=text)
            add_legend(figure, axes)
            warnings.filterwarnings("ignore", "Glyph")
            figure.draw_without_rendering()


@pytest.mark.parametrize(
    "text", [r"$\frac{$", "$x$ and $y_2$", r"\$", r"a\\$b", "$$", "$", "cost in $", "100%", "a & <b>"]
)
def test_text_is_drawn_as_it_stands(text, tmp_path):
    """The words in the SVG, which are text there."""
    svg = save(new_axes(text, "x", "y")[0], tmp_path, "figure")
    assert text in (unescape(found) for found in re.findall(r"<text[^>]*>([^<]*)</text>", svg))


def test_long_texts_are_drawn_on_lines():
    assert drawn("word " * 20, 24, lines=2) == "word word word word word\nword word word word word…"
    assert drawn("x" * 60) == "x" * 52 + "…" and drawn("漢" * 60) == "漢" * 26 + "…"
    assert drawn("") == "" and drawn("a\nb") == "a b" and drawn("short", 34, lines=2) == "short"


def test_the_page_holds_every_text_and_runs_none(page):
    html = page.read_bytes().decode("utf-8")  # so it is UTF-8 in spite of half a surrogate pair
    assert "<script" not in html and "<img" not in html and "onerror=alert(1)&gt;" in html
    assert "\0" not in html
    assert r"$\frac{$" in html and "漢字" in html

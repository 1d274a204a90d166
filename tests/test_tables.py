"""One table in all its forms: all digits in CSV, and escaping in each of the others."""

from __future__ import annotations

import csv
import io

import pytest
from rich.console import Console

from grade.latex import latex
from grade.tables import Column, Estimate, Table, numbers, rounded

TABLE = Table(
    "example",
    [Column("method"), Column("reward"), Column("interval", 1), Column("tokens", 0)],
    [
        ["grade_ste <b>[x]|", Estimate(0.81234, 0.01, 3), (0.25, 0.75), 12345],
        ["ppo\nppo", Estimate(0.5, None, 1), None, None],
    ],
    "Reward & <KL>.",
)


def test_html():
    html = TABLE.html()
    assert "Reward &amp; &lt;KL&gt;." in html and "<b>" not in html and "grade_ste &lt;b&gt;[x]|" in html
    for text in ("0.812 ± 0.010", "0.500", "0.2 to 0.8", "12,345"):
        assert f">{text}</td>" in html


def test_markdown():
    assert TABLE.markdown().splitlines() == [
        "| method | reward | interval | tokens |",
        "|---|---:|---:|---:|",
        "| grade_ste <b>[x]\\| | 0.812 ± 0.010 | 0.2 to 0.8 | 12,345 |",
        "| ppo ppo | 0.500 | – | – |",
    ]
    text = Table("", [Column("a"), *numbers(["b"])], [["", "1"]]).markdown(spaced=True)
    assert text.splitlines() == ["| a | b |", "| --- | ---: |", "| | 1 |"]


def test_the_terminal():
    console = Console(file=io.StringIO(), width=80)
    console.print(TABLE.rich())
    shown = console.file.getvalue()
    for text in ("example", "grade_ste <b>[x]|", "0.812 ± 0.010", "Reward & <KL>."):
        assert text in shown


@pytest.mark.parametrize("width", [34, 60, 80])
def test_a_narrow_terminal_gets_more_tables_and_whole_cells(width):
    names = [f"measure of number {i}" for i in range(8)]
    table = Table(
        "wide",
        [Column("run"), *numbers(names), Column("remark")],
        [["a_name", *(f"{i}.123 ± 0.456" for i in range(8)), "a remark of several words that may be broken"]],
        "About.",
    )
    console = Console(file=io.StringIO(), width=width)  # 16 characters a number, 10 for the run and the edge
    console.print(table.rich())
    lines = console.file.getvalue().splitlines()
    shown = "\n".join(lines)
    assert max(map(len, lines)) <= width and "…" not in shown
    assert shown.count("a_name") == shown.count(" run ") == {34: 9, 60: 4, 80: 3}[width]
    assert all(f" {i}.123 ± 0.456 " in shown for i in range(8)) and shown.count("wide") == shown.count("About.") == 1
    assert [word for word in "a remark of several words that may be broken".split() if word not in shown] == []


def test_what_fits_nowhere_is_broken_and_not_cut():
    console = Console(file=io.StringIO(), width=20)
    console.print(Table("t", [Column("key"), Column("number", right=True)], [["k" * 9, "1" * 40]]).rich())
    assert console.file.getvalue().count("1") == 40 and "…" not in console.file.getvalue()


def test_csv_keeps_all_digits():
    rows = list(csv.reader(io.StringIO(TABLE.csv())))
    assert rows == [
        ["method", "reward", "reward, standard error", "interval", "interval, upper", "tokens"],
        ["grade_ste <b>[x]|", "0.81234", "0.01", "0.25", "0.75", "12345"],
        ["ppo\nppo", "0.5", "", "", "", ""],
    ]


def test_latex():
    tex = TABLE.latex()
    line = r"grade\_ste \textless{}b\textgreater{}[x]\textbar{} & 0.812 $\pm$ 0.010 & 0.2 to 0.8 & 12,345 \\"
    assert line in tex and r"\begin{tabular}{lrrr}" in tex
    assert latex("50% of a_b & {c} #1 $x$ \\ ~^\nnext") == (
        r"50\% of a\_b \& \{c\} \#1 \$x\$ \textbackslash{} \textasciitilde{}\textasciicircum{} next"
    )
    assert r"{lp{0.25\textwidth}}" in Table("t", [Column("a"), Column("b")], [["x", "word " * 20]]).latex()


def test_rounding_never_hides_a_small_number():
    assert [rounded(0.0, 3), rounded(-0.25, 2), rounded(9.5e-14, 3)] == ["0.000", "−0.25", "9.5e−14"]


def test_a_row_of_another_length_is_a_mistake():
    with pytest.raises(ValueError, match="2 cells, 1 columns"):
        Table("t", [Column("a")], [["x", "y"]])

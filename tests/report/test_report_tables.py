"""One table as HTML, CSV and LaTeX: all digits in the one, escaping in the others."""

from __future__ import annotations

import csv
import io

import pytest

from grade.report.latex import latex
from grade.report.statistics import Estimate
from grade.report.tables import Column, Table, rounded

TABLE = Table(
    "example", "Reward & <KL>.", [Column("method"), Column("reward"), Column("interval", 1), Column("tokens", 0)],
    [
        ["grade_ste <b>", Estimate(0.81234, 0.01, 3), (0.25, 0.75), 12345],
        ["ppo", Estimate(0.5, None, 1), None, None],
    ],
)


def test_html_is_escaped_and_rounded():
    html = TABLE.html()
    assert "Reward &amp; &lt;KL&gt;." in html and "<b>" not in html and "grade_ste &lt;b&gt;" in html
    for text in ("0.812 ± 0.010", "0.500 ± –", "0.2 to 0.8", "12,345"):
        assert f">{text}</td>" in html


def test_csv_keeps_all_digits():
    rows = list(csv.reader(io.StringIO(TABLE.csv())))
    assert rows == [
        ["method", "reward", "reward, standard error", "interval", "interval, upper", "tokens"],
        ["grade_ste <b>", "0.81234", "0.01", "0.25", "0.75", "12345"],
        ["ppo", "0.5", "", "", "", ""],
    ]


def test_latex_is_escaped():
    tex = TABLE.latex()
    assert r"grade\_ste \textless{}b\textgreater{} & 0.812 $\pm$ 0.010 & 0.2 to 0.8 & 12,345 \\" in tex
    assert r"\begin{tabular}{lrrr}" in tex
    assert latex("50% of a_b & {c} #1 $x$ \\ ~^\nnext") == (
        r"50\% of a\_b \& \{c\} \#1 \$x\$ \textbackslash{} \textasciitilde{}\textasciicircum{} next"
    )


def test_long_text_is_a_paragraph_in_latex():
    assert r"{lp{0.25\textwidth}}" in Table("t", "", [Column("a"), Column("b")], [["x", "word " * 20]]).latex()


def test_rounding_never_hides_a_small_number():
    assert rounded(0.0, 3) == "0.000"
    assert rounded(-0.25, 2) == "−0.25"
    assert rounded(9.5e-14, 3) == "9.5e−14"


def test_a_row_of_another_length_is_a_mistake():
    with pytest.raises(ValueError, match="2 cells, 1 columns"):
        Table("t", "", [Column("a")], [["x", "y"]])

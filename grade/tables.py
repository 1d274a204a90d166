"""One table in every form that is shown here: for the terminal, as Markdown, HTML, CSV with all digits, and LaTeX
(booktabs). Each form writes out what would mean something to its reader."""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from grade.fitting import Fitting
from grade.latex import OTHER, latex


@dataclass(frozen=True)
class Estimate:
    """A mean with its standard error over seeds (None for one seed) and their number."""

    mean: float
    stderr: float | None
    n: int


Cell = str | int | float | Estimate | tuple[float, float] | None
"""Nothing, text, a count, a number, a mean over seeds, or an interval."""
NOTHING = "–"
_PAGE = 50  # lines of text
_FORMULA = tuple("=+-@\t\r\n＝＋－＠")
"""What a spreadsheet takes for the start of a formula."""


@dataclass(frozen=True)
class Column:
    """Title with its unit, and digits after the point of its numbers.

    Attributes:
        right: whether it stands to the right, and is broken nowhere; None: where its cells are not texts.
    """

    title: str
    digits: int = 3
    right: bool | None = None


def numbers(titles: Iterable[str]) -> list[Column]:
    """Columns of numbers that are written out already: texts to the right."""
    return [Column(title, right=True) for title in titles]


@dataclass(frozen=True)
class Table:
    """Rows of cells under columns. `title` also names its files in a report; `caption` says what is shown, and may be
    empty."""

    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""

    def __post_init__(self) -> None:
        wrong = [row for row in self.rows if len(row) != len(self.columns)]
        if wrong:
            raise ValueError(f"table {self.title}: a row of {len(wrong[0])} cells, {len(self.columns)} columns.")

    def rich(self, *, keys: int = 1, ends: Collection[int] = (), **options: Any) -> Fitting:
        """For the terminal: as many tables below each other as its width asks for, and no number broken or cut.

        Args:
            keys: columns that each of these tables begins with.
            ends: rows that a line follows.
            options: of rich's own table.
        """
        rows = [self.texts(row) for row in self.rows]
        titles = [column.title for column in self.columns]
        return Fitting(self.title, titles, self._right(), rows, self.caption, keys, ends, options)

    def markdown(self, *, spaced: bool = False) -> str:
        """As GitHub renders it, without title and caption.

        Args:
            spaced: the line of dashes has spaces, as in pages that comparisons have written.
        """
        dashes = ["---:" if right else "---" for right in self._right()]
        between = " | ".join(dashes) if spaced else "|".join(dashes)
        lines = [[column.title for column in self.columns], *map(self.texts, self.rows)]
        head, *rows = ("".join(f"| {_markdown(cell)} " if cell else "| " for cell in cells) + "|" for cells in lines)
        return "\n".join([head, f"| {between} |" if spaced else f"|{between}|", *rows])

    def html(self) -> str:
        """A table that scrolls by itself where it is wider than the page."""
        head = "".join(
            f'<th scope="col" class="{"number" if right else "text"}">{escape(column.title)}</th>'
            for column, right in zip(self.columns, self._right(), strict=True)
        )
        rows = "".join(f"<tr>{''.join(self._html_cells(row))}</tr>" for row in self.rows)
        # Not a <caption>: that would be as wide as the table, and scroll out of sight with it.
        caption = f'<p class="caption">{escape(self.caption)}</p>' if self.caption else ""
        return (
            f'{caption}<div class="scroll" role="region" tabindex="0" aria-label="table {escape(self.title)}">'
            f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
        )

    def _html_cells(self, row: Sequence[Cell]) -> list[str]:
        texts = [escape(text) for text in self.texts(row)]
        kinds = [
            "number" if column.right or not isinstance(cell, str) else "text" if len(cell) < 32 else "text long"
            for cell, column in zip(row, self.columns, strict=True)
        ]
        return [f'<th scope="row">{texts[0]}</th>'] + [
            f'<td class="{kind}">{text}</td>' for kind, text in zip(kinds[1:], texts[1:], strict=True)
        ]

    def csv(self) -> str:
        """All digits; a mean's standard error and an interval's upper end in columns of their own. A text that a
        spreadsheet would run as a formula has an apostrophe before it."""
        kinds = [self._kind(i) for i in range(len(self.columns))]
        titles: list[str] = []
        for column, kind in zip(self.columns, kinds, strict=True):
            further = {Estimate: [f"{column.title}, standard error"], tuple: [f"{column.title}, upper"]}
            titles += [column.title, *further.get(kind, [])]
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(map(_no_formula, titles))
        for row in self.rows:
            values = sum((_values(cell, kind) for cell, kind in zip(row, kinds, strict=True)), [])
            writer.writerow(map(_no_formula, values))
        return text.getvalue()

    def _are_texts(self) -> list[bool]:
        """By column, whether it holds text alone."""
        return [all(isinstance(row[i], (str, type(None))) for row in self.rows) for i in range(len(self.columns))]

    def _right(self) -> list[bool]:
        return [
            not text if column.right is None else column.right
            for column, text in zip(self.columns, self._are_texts(), strict=True)
        ]

    def _kind(self, column: int) -> type:
        kinds = {type(row[column]) for row in self.rows}
        return next((kind for kind in (Estimate, tuple) if kind in kinds), object)

    def latex(self) -> str:
        """A tabular for \\input: text to the left, in a paragraph where it is long; numbers to the right."""
        kinds = ["r" if right else "l" for right in self._right()]
        for i in range(len(self.columns)):
            if any(isinstance(cell := row[i], str) and len(cell) > 40 for row in self.rows):
                kinds[i] = r"p{0.25\textwidth}"
        # Only a longtable goes on over pages. A row after \\ may not start with what that takes for an option.
        name = "longtable" if self._lines() > _PAGE else "tabular"
        rows = [
            "{}" + " & ".join(map(latex, cells)) + r" \\"
            for cells in ([column.title for column in self.columns], *map(self.texts, self.rows))
        ]
        return "\n".join(
            [
                f"% needs \\usepackage{{booktabs}}{' and {longtable}' if name == 'longtable' else ''}",
                f"% {latex(' '.join(self.caption.split()))}",
                *([OTHER] if any(r"\othercharacter" in row for row in rows) else []),
                f"\\begin{{{name}}}{{{''.join(kinds)}}}",
                r"\toprule",
                rows[0],
                r"\midrule",
                *rows[1:],
                r"\bottomrule",
                f"\\end{{{name}}}",
                "",
            ]
        )

    def _lines(self) -> int:
        """About how many lines the rows take in LaTeX."""
        longest = [max((len(cell) for cell in row if isinstance(cell, str)), default=0) for row in self.rows]
        return sum(1 + length // 20 if length > 40 else 1 for length in longest)

    def texts(self, row: Sequence[Cell]) -> list[str]:
        """The cells of a row as people read them."""
        return [_text(cell, column.digits) for cell, column in zip(row, self.columns, strict=True)]


def _text(cell: Cell, digits: int) -> str:
    if cell is None:
        return NOTHING
    if isinstance(cell, str):
        return cell
    if isinstance(cell, Estimate):
        return rounded(cell.mean, digits) + ("" if cell.stderr is None else f" ± {rounded(cell.stderr, digits)}")
    if isinstance(cell, tuple):
        return f"{rounded(cell[0], digits)} to {rounded(cell[1], digits)}"
    return f"{cell:,}" if isinstance(cell, int) else rounded(cell, digits)


def rounded(value: float, digits: int) -> str:
    """To `digits` after the point; a small number that would become 0 to two figures that count."""
    if value and abs(value) < 0.5 * 10**-digits:
        return f"{value:.1e}".replace("-", "−")
    return f"{value:,.{digits}f}".replace("-", "−")


def _markdown(text: str) -> str:
    """On one line, with no end of a cell in it."""
    return " ".join(text.splitlines()).replace("|", "\\|")


def _values(cell: Cell, kind: type) -> list[object]:
    if isinstance(cell, Estimate):
        return [cell.mean, cell.stderr]
    if isinstance(cell, tuple):
        return list(cell)
    return [cell] if kind is object else [cell, None]


def _no_formula(value: object) -> object:
    """`value`, or where it is a text that starts like a formula and is no number, that text quoted."""
    if not isinstance(value, str):
        return value
    value = value.replace("\0", "�")  # at which readers of CSV stop
    quote = "'" if value.startswith(_FORMULA) else ""
    value = value.replace("\r\n", "\n").replace("\r", "\n")  # Python writes a return without quotes
    try:
        float(value)
    except ValueError:
        return quote + value
    return value

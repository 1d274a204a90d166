"""Tables in a terminal that is narrower than they are: several below each other instead of one with cells cut.

rich is loaded when a table is drawn: in its other forms a table needs nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

_TEXT = 16  # characters at which a cell of text may be broken
_WORD = 24  # and a single word


@dataclass(frozen=True)
class Fitting:
    """What rich prints.

    Attributes:
        titles: of the columns.
        right: by column, whether it stands to the right; its cells are broken nowhere.
        rows: cells by row, as they are read.
        keys: columns that each table begins with.
        ends: rows that a line follows.
        options: of rich's own table.
    """

    title: str
    titles: Sequence[str]
    right: Sequence[bool]
    rows: Sequence[Sequence[str]]
    caption: str
    keys: int
    ends: Collection[int]
    options: dict[str, Any]

    def __rich_console__(self, to: Console, options: ConsoleOptions) -> RenderResult:
        from rich.markup import escape
        from rich.table import Table as RichTable
        from rich.text import Text

        for number, columns in enumerate(self.pieces(options.max_width)):
            widths = self._widths(columns, options.max_width - _lines(len(columns)))
            shown = RichTable(title=None if number else self.title, **self.options)
            for column, width in zip(columns, widths, strict=True):
                shown.add_column(
                    self.titles[column], justify="right" if self.right[column] else "left", width=width, overflow="fold"
                )
            for i, row in enumerate(self.rows):
                shown.add_row(*(escape(row[column]) for column in columns), end_section=i in self.ends)
            yield shown
        if self.caption:
            yield Text(self.caption, style="table.caption")

    def pieces(self, width: int) -> list[list[int]]:
        """Columns by table, at least one beside the keys in each."""
        keys = list(range(self.keys))
        pieces = [keys]
        for column in range(self.keys, len(self.titles)):
            wider = [*pieces[-1], column]
            if len(wider) > self.keys + 1 and sum(map(self._least, wider)) + _lines(len(wider)) > width:
                wider = [*keys, column]
                pieces.append(wider)
            pieces[-1] = wider
        return pieces

    def _least(self, column: int) -> int:
        cells = [row[column] for row in self.rows]
        words = _longest(self.titles[column].split())
        if self.right[column]:
            return max(words, _longest(cells))
        inside = min(_longest([word for cell in cells for word in cell.split()]), _WORD)
        return max(words, inside, min(self._most(column), _TEXT))

    def _most(self, column: int) -> int:
        return _longest([self.titles[column], *(line for row in self.rows for line in row[column].splitlines())])

    def _widths(self, columns: Sequence[int], room: int) -> list[int]:
        """Characters of the columns, `room` of them at most: what each needs, and what is left to those that would be
        broken, the nearly whole ones first."""
        widths = [self._least(column) for column in columns]
        while sum(widths) > room and max(widths) > 1:  # even so it does not fit
            widths[widths.index(max(widths))] -= 1
        wanted = [max(self._most(column) - width, 0) for column, width in zip(columns, widths, strict=True)]
        left, waiting = max(room - sum(widths), 0), sorted(range(len(columns)), key=wanted.__getitem__)
        for place, i in enumerate(waiting):
            given = min(wanted[i], left // (len(waiting) - place))
            widths[i] += given
            left -= given
        return widths


def _longest(texts: Sequence[str]) -> int:
    from rich.cells import cell_len

    return max(map(cell_len, texts), default=0)


def _lines(columns: int) -> int:
    """Characters of a table that no cell has: lines between columns, and a space at each side of a cell."""
    return 3 * columns + 1

"""What a section of the page is made of."""

from __future__ import annotations

from dataclasses import dataclass, field

from matplotlib.figure import Figure

from grade.tables import Table


@dataclass(frozen=True)
class Text:
    """A paragraph. `kind` is "text", "note" (something is missing) or "warning" (something would mislead)."""

    text: str
    kind: str = "text"


@dataclass(frozen=True)
class Drawing:
    """A figure; `caption` says what is shown, of how many seeds, and what bands and bars mean; `alt` is what a reader
    who cannot see it is told."""

    name: str
    figure: Figure
    caption: str
    alt: str


@dataclass(frozen=True)
class Html:
    """Markup whose texts are escaped already, with the table of all of it for CSV and LaTeX."""

    html: str
    table: Table


@dataclass(frozen=True)
class Section:
    """A heading with an anchor, and what stands below it."""

    anchor: str
    title: str
    parts: list[Text | Drawing | Table | Html] = field(default_factory=list)

    def text(self, text: str) -> None:
        self.parts.append(Text(text))

    def note(self, text: str) -> None:
        self.parts.append(Text(text, "note"))

    def warn(self, text: str) -> None:
        self.parts.append(Text(text, "warning"))

    def add(self, part: Drawing | Table | Html) -> None:
        self.parts.append(part)

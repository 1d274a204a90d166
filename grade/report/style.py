"""How figures look: one colour per method, ink that follows the page, and a figure as PNG, PDF and inline SVG."""

from __future__ import annotations

import io
import re
import unicodedata
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure

from grade.report.groups import Group

INK = "#010203"
"""Text and axes. In the page this very colour becomes that of the page's text, light or dark."""
# Okabe and Ito's colours, which the colour-blind tell apart; black is the ink's, yellow is too pale on white.
_METHODS = {
    "grade-ste": "#0072B2",
    "grade": "#E69F00",
    "ppo": "#009E73",
    "reinforce": "#D55E00",
    "grpo": "#CC79A7",
    "grpo-token": "#56B4E9",
    "rloo": "#999933",
}
_OTHER = "#888888"
_MARKERS = {"grade-ste": "o", "grade": "s", "ppo": "^", "reinforce": "D", "grpo": "v", "grpo-token": "P", "rloo": "X"}
_DASHES = ("-", "--", ":", "-.")
_TINTS = (0.0, 0.45, -0.35, 0.65)
"""Towards white, or below 0 towards black: groups of one method."""
WIDTH = 4.8
"""Inches: at 10 points its text can be read on a phone that shows the figure 350 pixels wide."""
_SETTINGS = {
    "font.size": 10,
    "svg.fonttype": "none",
    "svg.hashsalt": "grade",
    "pdf.fonttype": 42,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "figure.titlesize": 12,
    "figure.titleweight": "normal",  # bold would be a second font in every PDF
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 9,
}


@dataclass(frozen=True)
class Style:
    """Of a group, the same in every figure."""

    colour: str
    marker: str
    dash: str


def style_of(group: Group) -> Style:
    """The method's colour; other groups of the method have other tints and dashes."""
    own = method_style(group.method)
    return replace(
        own, colour=tinted(own.colour, _TINTS[group.rank % len(_TINTS)]), dash=_DASHES[group.rank % len(_DASHES)]
    )


def method_style(method: str) -> Style:
    """Of a method in `COMPARED`, whatever groups of it there are."""
    return Style(method_colour(method), _MARKERS.get(method, "o"), _DASHES[0])


def method_colour(method: str) -> str:
    """Of a method in `COMPARED`; grey for any other."""
    return _METHODS.get(method, _OTHER)


def tinted(colour: str, amount: float) -> str:
    """`colour`, moved by a share towards white (amount > 0) or black (< 0)."""
    end = 1.0 if amount > 0 else 0.0
    return to_hex([part + (end - part) * abs(amount) for part in to_rgb(colour)])


def new_axes(title: str, xlabel: str, ylabel: str, height: float = 3.2) -> tuple[Figure, Axes]:
    """A figure of one panel, `WIDTH` wide."""
    with matplotlib.rc_context(_SETTINGS):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        axes = figure.subplots()
        axes.set(xlabel=drawn(xlabel), ylabel=drawn(ylabel))
        figure.suptitle(drawn(title), x=0.01, horizontalalignment="left")
    axes.tick_params(color=INK, labelcolor=INK)
    axes.grid(color=INK, alpha=0.15, linewidth=0.6)
    return figure, axes


def drawn(text: str, width: float = 52, lines: int = 1) -> str:
    """`text` for matplotlib to draw as it stands: it would read what is between two dollars as mathematics, and fail at
    what is none; controls, marks of direction and halves of surrogate pairs have no glyph; too long a text leaves no
    room for axes.

    Args:
        width: of a line, in small letters.
        lines: how many at most; what is longer ends in dots.
    """
    text = "".join(
        "�" if unicodedata.category(c) in ("Cc", "Cs") else c
        for c in " ".join(text.split())
        if unicodedata.category(c) != "Cf"
    )
    found: list[str] = []
    rest = text
    while rest and len(found) < lines:
        reached = list(accumulate(map(_letters, rest)))
        fits = sum(so_far <= width for so_far in reached)
        if fits < len(rest):
            space = rest.rfind(" ", 1, fits + 1)
            fits = space if space > 0 and len(found) + 1 < lines else max(fits, 1)
        found.append(rest[:fits].strip())
        rest = rest[fits:].strip()
    return "\n".join(found).replace("$", r"\$") + "…" * bool(rest)


def _letters(character: str) -> float:
    """About how many small letters are as wide."""
    wide = unicodedata.east_asian_width(character) in "WF" or character == "�"
    return 2.0 if wide else 1.6 if character in "WMm%@" else 1.0


def add_legend(figure: Figure, axes: Axes, handles: Sequence | None = None) -> None:
    """Below the panel, in as many columns as its labels leave room for; the figure grows by its rows."""
    handles = list(handles if handles is not None else axes.get_legend_handles_labels()[0])
    if not handles:
        return
    labels = [drawn(handle.get_label()) for handle in handles]
    longest = max(map(len, labels))
    columns = max(1, min(len(handles), 52 // (longest + 6)))
    figure.set_figheight(figure.get_figheight() + 0.2 * -(-len(handles) // columns))
    with matplotlib.rc_context(_SETTINGS):
        figure.legend(handles=handles, labels=labels, loc="outside lower center", ncols=columns)


def save(figure: Figure, folder: Path, name: str) -> str:
    """Write `name`.png and `name`.pdf; return the figure as SVG for the page."""
    with matplotlib.rc_context(_SETTINGS), warnings.catch_warnings():
        # A box stands for it in PNG and PDF; the page's SVG is text, for which a browser finds a font.
        warnings.filterwarnings("ignore", r"Glyph \d+ .*missing from font", UserWarning)
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # laid out now, once for all formats
        figure.savefig(folder / f"{name}.png", dpi=200, facecolor="white")
        figure.savefig(folder / f"{name}.pdf", metadata={"CreationDate": None})
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    return _inline(text.getvalue(), name)


def _inline(svg: str, name: str) -> str:
    """An SVG file as an element of a page: no prologue, ids of its own, the page's ink, no digits beyond sight."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<svg [^>]*?viewBox="([^"]+)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', svg, count=1)
    svg = re.sub(r'(\bid="|url\(#|xlink:href="#)', rf"\g<1>{name}-", svg).replace("xlink:href", "href")
    svg = re.sub(r'\bd="[^"]*"', lambda d: re.sub(r"(\.\d\d)\d+", r"\1", d[0]), svg)
    return svg.replace(INK, "currentColor")


def legend_order(groups: Sequence[Group]) -> dict[str, Style]:
    """Label -> style, in the order of the groups."""
    return {group.label: style_of(group) for group in groups}

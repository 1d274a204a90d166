"""The page: one HTML file that loads nothing, with figures and tables also as files beside it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from html import escape
from pathlib import Path

from grade import __version__
from grade.errors import writing
from grade.files import replace_bytes
from grade.report.parts import Drawing, Section, Text
from grade.report.style import save
from grade.tables import Table

_STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --ink: #1b1f24; --soft: #59636e; --line: #d5dae0; --box: #f4f6f8;
  --link: #0b5cad; --warning: #8a4b00; --warning-box: #fff4e2; }
@media (prefers-color-scheme: dark) { :root { --page: #14171b; --ink: #e6e9ed; --soft: #9aa4b0; --line: #363d46;
  --box: #1d2127; --link: #79b8ff; --warning: #ffc069; --warning-box: #33270f; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 72rem; background: var(--page); color: var(--ink);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: .5rem 0; }
h2 { font-size: 1.3rem; margin: 2.5rem 0 .75rem; padding-top: .5rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.25rem 0 .5rem; }
a { color: var(--link); }
nav ul { display: flex; flex-wrap: wrap; gap: .25rem 1rem; padding: 0; list-style: none; }
.note { color: var(--soft); }
.warning { color: var(--warning); background: var(--warning-box); padding: .5rem .75rem;
  border-left: 4px solid currentColor; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 27rem), 1fr)); gap: 1.5rem;
  align-items: start; margin: 1rem 0; }
figure { margin: 0; min-width: 0; max-width: 40rem; }
figure svg { display: block; width: 100%; height: auto; }
figcaption, .caption, .files { font-size: .85rem; color: var(--soft); }
.scroll { overflow-x: auto; margin: .5rem 0 .25rem; }
.files { margin: 0 0 1rem; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
.caption { margin: 1.5rem 0 0; max-width: 50rem; }
th, td { padding: .3rem 1rem .3rem 0; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top;
  white-space: nowrap; }
thead th { white-space: normal; vertical-align: bottom; overflow-wrap: normal; }
.text, th:first-child { text-align: left; }
.long { white-space: normal; overflow-wrap: normal; min-width: 14rem; }
tbody th { font-weight: 600; white-space: normal; overflow-wrap: normal; min-width: 5rem; }
details { margin: 1rem 0; }
summary { font-weight: 600; cursor: pointer; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: .5rem; margin: .75rem 0; padding: .75rem;
  background: var(--box); border-radius: .4rem; }
.pair p { margin: 0; white-space: pre-wrap; }
.pair span { display: block; font-size: .8rem; color: var(--soft); white-space: normal; }
.prompt { grid-column: 1 / -1; }
.pair p, th, td { unicode-bidi: isolate; }
@media (max-width: 40rem) { .pair { grid-template-columns: 1fr; }
  .text { white-space: normal; min-width: 6rem; } .long { min-width: 11rem; } }
@media print { .figures { display: block; } figure { break-inside: avoid; } }
"""


def write_page(title: str, sections: list[Section], output: Path) -> Path:
    """Write index.html, figures/NAME.{png,pdf} and tables/NAME.{csv,tex} under `output`; return the page's path.

    Figures and tables that an earlier page there links to, and this one has no more, are deleted.

    Raises:
        GradeError: `output` cannot be written.
    """
    path = output / "index.html"
    with writing(output, "--output"):
        for folder in ("figures", "tables"):
            (output / folder).mkdir(parents=True, exist_ok=True)
        before = _linked(path.read_text(encoding="utf-8", errors="replace")) if path.is_file() else set()
    body = "".join(_section(section, output) for section in sections)
    _write(path, _page(title, sections, body))
    with writing(output, "--output"):
        for name in before - _linked(body):
            (output / name).unlink(missing_ok=True)
    return path


def _write(path: Path, text: str) -> None:
    """Replace a file as a whole; half of a surrogate pair, which UTF-8 does not have, becomes a question mark."""
    with writing(path, "--output"):
        replace_bytes(path, text.encode("utf-8", "replace"))


def _page(title: str, sections: list[Section], body: str) -> str:
    title = escape(title)
    contents = "".join(f'<li><a href="#{s.anchor}">{escape(s.title)}</a></li>' for s in sections)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        # Whatever a sample says, a browser fetches and runs nothing.
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        'img-src data:">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><title>{title}</title><style>{_STYLE}</style></head>\n'
        f'<body><header><h1>{title}</h1><nav aria-label="contents"><ul>{contents}</ul></nav></header>\n<main>{body}'
        f'</main>\n<footer class="note"><p>grade {escape(__version__)}</p></footer></body></html>\n'
    )


def _section(section: Section, output: Path) -> str:
    html, figures = [f'<section id="{section.anchor}"><h2>{escape(section.title)}</h2>'], []
    for part in section.parts:
        if isinstance(part, Drawing):
            figures.append(_drawing(part, output))
            continue
        html, figures = html + _grid(figures), []
        if isinstance(part, Text):
            html.append(f'<p class="{part.kind}">{escape(part.text)}</p>')
        elif isinstance(part, Table):
            html.append(part.html() + _files(part, output))
        else:
            html.append(part.html + _files(part.table, output))
    return "".join([*html, *_grid(figures), "</section>\n"])


def _grid(figures: list[str]) -> list[str]:
    return [f'<div class="figures">{"".join(figures)}</div>'] if figures else []


def _drawing(part: Drawing, output: Path) -> str:
    with writing(output / "figures" / part.name, "--output"):
        svg = save(part.figure, output / "figures", part.name)
    return (
        f'<figure id="figure-{part.name}"><div role="img" aria-label="{escape(part.alt)}">{svg}</div>'
        f"<figcaption>{escape(part.caption)} {_links('figures', part.name, ('png', 'pdf'))}</figcaption></figure>"
    )


def _files(table: Table, output: Path) -> str:
    _write(output / "tables" / f"{table.title}.csv", table.csv())
    _write(output / "tables" / f"{table.title}.tex", table.latex())
    return f'<p class="files">{_links("tables", table.title, ("csv", "tex"))}</p>'


def _linked(html: str) -> set[str]:
    """Files that a page of ours links to, relative to its folder."""
    return set(re.findall(r'href="((?:figures|tables)/[\w.-]+\.(?:png|pdf|csv|tex))"', html))


def _links(folder: str, name: str, kinds: Iterable[str]) -> str:
    return " ".join(f'<a href="{folder}/{name}.{kind}">{kind.upper()}</a>' for kind in kinds)

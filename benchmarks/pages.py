"""The numbers of a page, written into it by the commands that print them.

    python -m benchmarks.pages                     # every page of the repository, written anew
    python -m benchmarks.pages --check             # exit status 1 if a page does not say what its commands print

A block begins with the comment `<!-- python -m benchmarks.NAME ARGUMENTS -->` and ends with `<!-- end -->`; what is
between them is the command's output. A second command after ` | ` takes part of it: `rows A-B` lines A to B, from 1.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import re
import shlex
import sys
from pathlib import Path

from benchmarks.saved import new_parser

PAGES = ("*.md", "docs/**/*.md", "benchmarks/**/*.md")
"""Where pages are, from the repository's root."""
_BLOCK = re.compile(
    r"^(<!-- python -m (benchmarks\.\w+)([^\n|]*?)(?: \| rows (\d+)-(\d+))? -->\n)(.*?)^<!-- end -->$",
    re.MULTILINE | re.DOTALL,
)


def pages_in(root: Path) -> list[Path]:
    """Every page of a repository."""
    return sorted(path for pattern in PAGES for path in root.glob(pattern))


def main(arguments: list[str] | None = None) -> None:
    parser = new_parser(__doc__)
    parser.add_argument("pages", nargs="*", type=Path, help="default: every page")
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args(arguments)
    stale = []
    pages = options.pages or pages_in(Path())
    if not pages:
        sys.exit("There is no page here. Call this in the repository's root, or name a page.")
    for page in pages:
        try:
            before = page.read_text(encoding="utf-8")
        except OSError as error:
            sys.exit(f"{page} cannot be read ({error.strerror}). Call this in the repository's root, or name a page.")
        after = written(before)
        if after != before:
            stale.append(str(page))
            if not options.check:
                page.write_text(after, encoding="utf-8")
    if options.check and stale:
        sys.exit(f"Not what the commands print: {', '.join(stale)}. Run python -m benchmarks.pages.")


def written(page: str) -> str:
    """The page with every block's text replaced by what its command prints now."""
    if page.count("<!-- python -m") != len(_BLOCK.findall(page)):
        raise ValueError("a block has no <!-- end -->, or its command is not one of python -m benchmarks.NAME")
    return _BLOCK.sub(_block, page)


def _block(match: re.Match) -> str:
    head, module, arguments, first, last, _ = match.groups()
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        importlib.import_module(module).main(shlex.split(arguments))
    lines = out.getvalue().strip("\n").split("\n")
    if first:
        lines = lines[int(first) - 1 : int(last)]
    return head + "\n" + "\n".join(lines) + "\n\n<!-- end -->"


if __name__ == "__main__":
    main()

"""What a benchmark measures, kept with --save, and the document that says it."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from grade.errors import GradeError, read_json
from grade.files import replace_text

SAVED = "a file that this command has kept with --save"


def read_saved(path: Path, kind: str, *keys: str, of_rows: Sequence[str] = ()) -> dict:
    """The JSON file.

    Args:
        kind: what it should be, in words.
        keys: what it must have.
        of_rows: what every one of its "rows" must have.

    Raises:
        SystemExit: there is none, or it is another command's; with the fix.
    """
    fix = f"Name {kind}."
    try:
        found = read_json(path, fix, *keys)
    except GradeError as error:
        sys.exit(str(error))
    missing = [key for key in of_rows if any(key not in row for row in found["rows"])]
    if missing:
        sys.exit(f"{path} has rows without {missing[0]!r}: it is another command's. {fix}")
    return found


def new_parser(description: str | None) -> argparse.ArgumentParser:
    """A command's parser, whose help begins with its file's docstring as it stands."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def command(
    parser: argparse.ArgumentParser,
    arguments: list[str] | None,
    measure: Callable[[argparse.Namespace], dict],
    document: Callable[[dict], str],
    *keys: str,
    of_rows: Sequence[str] = (),
) -> None:
    """Measure, or with --table read what was kept; with --save keep it; print the document.

    Args:
        measure: options -> what is kept, as JSON has it.
        keys, of_rows: as `read_saved` takes them.
    """
    parser.add_argument("--save", type=Path, help="keep what was measured, as JSON")
    parser.add_argument("--table", type=Path, help="print the tables of a saved file, measure nothing")
    options = parser.parse_args(arguments)
    if options.table is not None:
        saved = read_saved(options.table, SAVED, *keys, of_rows=of_rows)
    else:
        saved = json.loads(json.dumps(measure(options)))
        if options.save is not None:
            write_saved(options.save, saved)
    print(document(saved), end="")


def write_saved(path: Path, found: dict) -> None:
    """As `read_saved` reads it; the file is always whole, the earlier one until this one is written."""
    replace_text(path, json.dumps(found, indent=1) + "\n")

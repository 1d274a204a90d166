"""What a benchmark measures, kept with --save, and the document that says it."""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from grade.errors import GradeError, read_json, reason_of
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
    if of_rows:
        rows = found["rows"]
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            sys.exit(f"{path} is damaged: its rows are no list of objects. {fix}")
        if not rows:
            sys.exit(f"{path} has no rows: nothing was measured. {fix}")
        missing = [key for key in of_rows if any(key not in row for row in rows)]
        if missing:
            sys.exit(f"{path} has rows without {missing[0]!r}: it is another command's. {fix}")
    return found


def document_of(path: Path, found: dict, document: Callable[[dict], str]) -> str:
    """What `document` makes of what `read_saved` has found.

    Raises:
        SystemExit: it lacks something, or something is of another type.
    """
    try:
        return document(found)
    except (AttributeError, LookupError, TypeError, ValueError, StopIteration) as error:
        reason = reason_of(error)
        sys.exit(f"{path} is damaged, or of another version of this command ({reason}). Measure again with --save.")


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

    Raises:
        SystemExit: a file is refused, or could not be written; what was measured is then printed.
    """
    parser.add_argument("--save", type=Path, help="keep what was measured, as JSON")
    parser.add_argument("--table", type=Path, help="print the tables of a saved file, measure nothing")
    options = parser.parse_args(arguments)
    if options.table is not None:
        found = read_saved(options.table, SAVED, *keys, of_rows=of_rows)
        print(document_of(options.table, found, document), end="")
        return
    if options.save is not None:
        check_place("--save", options.save)
    saved = json.loads(json.dumps(measure(options)))
    failure = None
    if options.save is not None:
        try:
            write_saved(options.save, saved)
        except OSError as error:  # such as a full disk: what took minutes is shown all the same
            failure = f"--save {options.save} could not be written ({reason_of(error)}). Keep the JSON above as a file."
    print(document(saved), end="")
    if failure is not None:
        print(json.dumps(saved))
        sys.exit(failure)


def check_place(option: str, path: Path) -> None:
    """Find out before any work whether a file can be written.

    Raises:
        SystemExit: it cannot; with the reason and the fix.
    """
    reason = None
    if path.is_dir():
        reason = "it is a folder"
    elif not path.absolute().parent.is_dir():
        reason = "its folder does not exist"
    elif not os.access(path.absolute().parent, os.W_OK):
        reason = "its folder cannot be written to"
    if reason is not None:
        sys.exit(f"{option} {path} cannot be written: {reason}. Name a file in a folder that is there.")


def check_plot(path: Path) -> None:
    """The same of --plot, which needs matplotlib too."""
    if importlib.util.find_spec("matplotlib") is None:
        sys.exit("--plot needs matplotlib, which is not installed. Run pip install -e '.[report]'.")
    check_place("--plot", path)


def number(kind: type[int] | type[float], least: float, *, above: bool = False) -> Callable[[str], float]:
    """The type of an option that is a finite number from `least` on, or above it."""

    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and (value > least if above else value >= least)):
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(
                f"must be {what} {f'above {least:g}' if above else f'from {least:g} on'}, got {text!r}"
            )
        return value

    return read


def write_saved(path: Path, found: dict) -> None:
    """As `read_saved` reads it; the file is always whole, the earlier one until this one is written."""
    replace_text(path, json.dumps(found, indent=1) + "\n")

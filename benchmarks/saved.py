"""Results that a benchmark has kept with --save."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from grade.errors import GradeError, read_json

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

"""Results that a benchmark has kept with --save."""

from __future__ import annotations

import sys
from pathlib import Path

from grade.errors import GradeError, read_json


def read_saved(path: Path, *keys: str) -> dict:
    """The JSON file.

    Raises:
        SystemExit: there is none, or it is not one with these keys; with the fix.
    """
    try:
        return read_json(path, "Name a file that the command in question has written.", *keys)
    except GradeError as error:
        sys.exit(str(error))

"""The error that a user can mend, how other libraries' errors are quoted in it, and files that may be damaged."""

from __future__ import annotations

import json
from pathlib import Path


class GradeError(Exception):
    """The user can mend it: its text names the setting, the reason and the fix; the CLI exits with 2."""


def first_line(error: Exception) -> str:
    """What another library's error says, in one line: some of their messages list every choice there is."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def read_json(path: Path, fix: str, *keys: str) -> dict:
    """The object in a JSON file.

    Args:
        fix: a sentence that says what to do if it cannot be had.
        keys: what the object must have.

    Raises:
        GradeError: the file cannot be read, is damaged, or holds something else; with its name and the fix.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise GradeError(f"{path} cannot be read ({reason}). {fix}") from error
    if not isinstance(found, dict):
        raise GradeError(f"{path} holds no JSON object. {fix}")
    missing = [key for key in keys if key not in found]
    if missing:
        raise GradeError(f"{path} has no entry {missing[0]!r}. {fix}")
    return found

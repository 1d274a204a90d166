"""The error that a user can mend, how other libraries' errors are quoted in it, and files that may be damaged."""

from __future__ import annotations

import json
import re
from pathlib import Path


class GradeError(Exception):
    """The user can mend it: its text names the setting, the reason and the fix; the CLI exits with 2."""


_LONGEST_LINE, _LONGEST_HEAD = 240, 400  # characters
_CHOICE = re.compile(r"\(\d\) ")


def reason_of(error: BaseException) -> str:
    """What another library's error says, in one line that holds its reason.

    The reason may stand at the beginning (before a list of every choice there is) or in the last line (after what was
    tried). So a short message is given whole, and of a long one the beginning and the last line.
    """
    lines = [" ".join(line.split()) for line in str(error).split("\n")]
    lines = [line for line in lines if line]
    if len(lines) > 1 and _CHOICE.match(lines[1]):  # "... one of:", "(1) this", "(2) that", then the reason
        lines = [line for line in lines[1:] if not _CHOICE.match(line)] or lines
    if not lines:
        return type(error).__name__
    if isinstance(error, KeyError):  # says the key and no more
        return f"{type(error).__name__}: {lines[0]}"
    # A line longer than that lists choices or dumps data; it is shown only if there is nothing else.
    lines = [line for line in lines if len(line) <= _LONGEST_LINE] or [lines[0][:_LONGEST_LINE] + " ..."]
    shown = lines[:1]
    while len(shown) < len(lines) and len(" ".join(shown)) + len(lines[len(shown)]) < _LONGEST_HEAD:
        shown.append(lines[len(shown)])
    return " ".join(shown if len(shown) == len(lines) else [*shown, "...", lines[-1]])


first_line = reason_of


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
        reason = getattr(error, "strerror", None) or reason_of(error)
        raise GradeError(f"{path} cannot be read ({reason}). {fix}") from error
    if not isinstance(found, dict):
        raise GradeError(f"{path} holds no JSON object. {fix}")
    missing = [key for key in keys if key not in found]
    if missing:
        raise GradeError(f"{path} has no entry {missing[0]!r}. {fix}")
    return found

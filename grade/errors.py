"""The error that a user can mend, how other libraries' errors are quoted in it, and files that may be damaged or
may not be written."""

from __future__ import annotations

import errno
import json
import os
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator


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
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise GradeError(f"{path} cannot be read ({reason}). {fix}") from error
    if not isinstance(found, dict):
        raise GradeError(f"{path} holds no JSON object. {fix}")
    missing = [key for key in keys if key not in found]
    if missing:
        raise GradeError(f"{path} has no entry {missing[0]!r}. {fix}")
    return found


@contextmanager
def writing(path: Path, setting: str, fix: str = "") -> Iterator[None]:
    """Turn what goes wrong while the block writes `path` into words; the block should do nothing else.

    Not only an OSError: safetensors and torch.save report a full disk as errors of their own.

    Args:
        setting: what decides the place, such as "train.run_dir" or "--output".
        fix: a sentence that says what to do; by default to make room or to name another folder.

    Raises:
        GradeError: with the file, the reason and the fix.
    """
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason, fix = error.strerror or first_line(error), fix or _room(setting, full)
        raise GradeError(f"{setting}: {path} could not be written ({reason}). {fix}") from error
    except Exception as error:
        library = any(name in str(error) for name in _FAILED_WRITES)
        if isinstance(error, GradeError) or not library:
            raise
        raise GradeError(
            f"{setting}: {path} could not be written ({first_line(error)}). {fix or _room(setting, True)}"
        ) from error


@contextmanager
def printing() -> Iterator[None]:
    """The same for standard output; a reader that has gone (`grade doctor | head`) has seen what it wanted.

    Raises:
        GradeError: with the reason.
    """
    try:
        yield
        sys.stdout.flush()  # what is left to Python's end fails there
    except OSError as error:
        # Python flushes once more at its end: give it somewhere to write.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            reason = error.strerror or first_line(error)
            raise GradeError(f"standard output could not be written ({reason}): make room where it goes.") from error


_FAILED_WRITES = ("I/O error", "inline_container.cc", "PytorchStreamWriter", "Parent directory")
"""Parts of the messages of safetensors and of torch.save."""


def _room(setting: str, full: bool) -> str:
    return f"{'Make room on its disk, or name' if full else 'Name'} another folder with {setting}."

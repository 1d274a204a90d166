"""The error that a user can mend, how other libraries' errors are quoted in it, files that may be damaged or may not be
written, and values that must be there."""

from __future__ import annotations

import errno
import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from grade.shapes import Shape, is_too_deep, misfit

T = TypeVar("T")


class GradeError(Exception):
    """The user can mend it: its text names the setting, the reason and the fix; the CLI exits with 2."""


_LONGEST_LINE, _LONGEST_HEAD = 240, 400  # characters
_CHOICE = re.compile(r"\(\d\) ")


class RewardFailed(GradeError):
    """Somebody's own reward has failed, or gave no numbers; the step or evaluation that asked it changed nothing."""


class RolloutFailed(GradeError):
    """Responses from elsewhere could not be had, or cannot be used; nothing of the step that needs them was done."""


class NotFinite(RewardFailed):
    """It gave a number that is not finite."""


class Collapsed(GradeError):
    """An alarm of `guard` has ended a run, whose last step is saved; the CLI exits with 3."""


class NothingLeft(GradeError):
    """A run that is to go on has had all its steps; to one that goes on where it can, that is no mistake."""


def present(value: T | None) -> T:
    """`value`, for what is None only where the caller has not asked for it, or not yet.

    Raises:
        ValueError: it is None.
    """
    if value is None:
        raise ValueError("a value is missing that was to be there by now")
    return value


def failure_of(error: BaseException) -> str:
    """Why something could not be read or written: what the system says, without its number and the path, which a
    message names itself; of another error, `reason_of`."""
    return getattr(error, "strerror", None) or reason_of(error)


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


def read_json(path: Path, fix: str, *keys: str, shape: Shape = None) -> dict:
    """The object in a JSON file.

    Args:
        fix: a sentence that says what to do if it cannot be had.
        keys: what the object must have.
        shape: what it must be, in the terms of `grade.shapes`; None: any object.

    Raises:
        GradeError: the file cannot be read, is damaged, or holds something else; with its name and the fix.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = failure_of(error)
        raise GradeError(f"{path} cannot be read ({reason}). {fix}".strip()) from error
    if not isinstance(found, dict):
        raise GradeError(f"{path} holds no JSON object. {fix}".strip())
    missing = [key for key in keys if key not in found]
    if missing:
        raise GradeError(f"{path} has no entry {missing[0]!r}. {fix}".strip())
    wrong = "it is nested too deeply" if is_too_deep(found) else None if shape is None else misfit(found, shape)
    if wrong is not None:
        raise GradeError(f"{path} is damaged, or of something else: {wrong}. {fix}".strip())
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
        reason, fix = failure_of(error), fix or _room(setting, full)
        raise GradeError(f"{setting}: {path} could not be written ({reason}). {fix}") from error
    except Exception as error:
        library = any(name in str(error) for name in _FAILED_WRITES)
        if isinstance(error, GradeError) or not library:
            raise
        raise GradeError(
            f"{setting}: {path} could not be written ({reason_of(error)}). {fix or _room(setting, True)}"
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
            reason = failure_of(error)
            raise GradeError(f"standard output could not be written ({reason}): make room where it goes.") from error


_FAILED_WRITES = ("I/O error", "inline_container.cc", "PytorchStreamWriter", "Parent directory", "(os error ")
"""Parts of the messages of safetensors, of torch.save and of tokenizers."""


def _room(setting: str, full: bool) -> str:
    return f"{'Make room on its disk, or name' if full else 'Name'} another folder with {setting}."

"""JSON lines: logs of one object a line, appended while a run goes on and read when it was stopped in the middle."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from grade.errors import GradeError, failure_of
from grade.shapes import is_too_deep


class Rows(NamedTuple):
    """What a file of JSON lines holds."""

    rows: list[dict]
    """The objects, in the file's order."""
    broken: list[int]
    """Numbers, from 1, of the lines that are no object; the last line is not among them."""
    cut: bool
    """Whether the last line is no object: it is still being written, or was cut short when its writer was stopped."""


def read_rows(path: Path) -> Rows:
    r"""The rows of a file; none if there is no such file.

    Lines end at "\n" and nowhere else: a sample's text may hold U+2028, U+0085 or a vertical tab, at which
    `str.splitlines` would cut its row in two.

    Raises:
        GradeError: the file is there and cannot be read.
    """
    try:
        return rows_of(path.read_bytes())
    except FileNotFoundError:
        return Rows([], [], False)
    except OSError as error:
        raise GradeError(f"{path} cannot be read ({failure_of(error)}).") from error


def rows_of(content: bytes) -> Rows:
    """The rows of a file's content."""
    lines = content.split(b"\n")
    if not lines[-1]:
        lines.pop()  # what follows the last line's end
    rows, broken = [], []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict) and not is_too_deep(row):
            rows.append(row)
        else:
            broken.append(number)
    cut = bool(broken) and broken[-1] == len(lines)
    return Rows(rows, broken[:-1] if cut else broken, cut)


def append_rows(path: Path, rows: Iterable[dict]) -> None:
    """Append rows in one write, so that a stop leaves at most the last one cut.

    Raises:
        OSError: the disk is full, or the file cannot be written.
    """
    with path.open("ab", buffering=0) as file:
        left = memoryview(encode_rows(rows))
        while left:
            left = left[file.write(left) :]


def encode_rows(rows: Iterable[dict]) -> bytes:
    """Rows as the bytes of a file, for a writer that replaces a file as a whole.

    Half of a surrogate pair, which UTF-8 does not have, becomes JSON's own escape and is read back as it was.
    """
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8", "backslashreplace")

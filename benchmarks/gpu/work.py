"""A worker's side of a part: what it may take, and where its rows go.

Workers of a part share a folder. Who makes the file of a key first has taken it; the file `open-PID` names what a
worker is at, by which `pool.run` knows what hangs, or what a process was at that has died.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.gpu.rows import Rows

VARIABLE = "GRADE_GPU_WORK"
BROKEN = 75
"""Exit status of a worker whose device takes no more work: another process goes on where it stopped."""


@dataclass(frozen=True)
class Order:
    """What a worker is told.

    Args:
        part: its name.
        file, of: as `Rows` takes them.
        folder: what the part's workers share.
        until: seconds since the epoch; nothing is begun after it.
        dry: sizes and models are toys, and Triton's interpreter runs the kernels on a CPU.
    """

    part: str
    file: str
    of: str
    folder: str
    until: float
    dry: bool

    def environment(self) -> dict[str, str]:
        return {VARIABLE: json.dumps(asdict(self))}


def ordered() -> Order:
    """This process's order.

    Raises:
        SystemExit: it has none.
    """
    if VARIABLE not in os.environ:
        sys.exit("This is a part of python -m benchmarks.gpu, which starts it.")
    return Order(**json.loads(os.environ[VARIABLE]))


class Work:
    """The part as one of its workers sees it."""

    def __init__(self, order: Order):
        self.order, self.folder = order, Path(order.folder)
        self.rows = Rows(Path(order.file), order.of)

    def time_is_up(self) -> bool:
        return time.time() > self.order.until

    def plan(self, keys: list[str]) -> None:
        """What the part consists of; one of its workers writes it down."""
        if take(self.folder, "plan " + json.dumps(keys)):
            self.rows.add_plan(self.order.part, keys)

    def is_again(self, key: str) -> bool:
        """Whether it was tried before: what never was comes first, so that nothing stands in its way in every call."""
        return key in self.rows.latest

    def begin(self, key: str) -> bool:
        """Whether this worker is to measure it: it is not kept, not taken by another, and there is time."""
        if self.rows.kept(key) is not None or self.time_is_up() or not take(self.folder, key):
            return False
        self._at(key)
        return True

    def enter(self, key: str) -> bool:
        """The same for what holds several rows, which a worker that comes after one that died enters again."""
        if self.rows.kept(key) is not None or self.time_is_up() or _place(self.folder, key).exists():
            return False
        self._at(key)
        return True

    def _at(self, key: str) -> None:
        being = opened(self.folder, os.getpid())
        fresh = being.with_suffix(".new")
        fresh.write_text(key, encoding="utf-8")
        fresh.replace(being)

    def done(self, key: str, row: dict) -> dict:
        """Keep the row of what was begun."""
        row = self.rows.add(key, row)
        opened(self.folder, os.getpid()).unlink(missing_ok=True)
        return row


def take(folder: Path, key: str) -> bool:
    """Whether nobody had taken it in this call."""
    try:
        _place(folder, key).open("x").close()
    except FileExistsError:
        return False
    return True


def opened(folder: Path, process: int) -> Path:
    """The file with the key that a process is at; there is none between two."""
    return folder / f"open-{process}"


def _place(folder: Path, key: str) -> Path:
    return folder / hashlib.sha256(key.encode()).hexdigest()[:32]

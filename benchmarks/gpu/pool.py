"""The workers of a part: processes that are stopped when they hang, replaced when they die, and ended in time."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu.rows import Rows
from benchmarks.gpu.work import BROKEN, Order, opened, take

REPLACED = 6
"""Workers of a part that may die before no other takes their place."""
_POLL = 0.05  # seconds


@dataclass(frozen=True)
class Crew:
    """How a part is worked on.

    Args:
        command: of a worker, whose order is in its environment.
        workers: at a time.
        patience: seconds after which what a worker is at counts as hanging.
    """

    command: list[str]
    workers: int
    patience: float
    environment: dict[str, str]


def run(crew: Crew, order: Order, log: Path, stopped: Callable[[], bool] = lambda: False) -> list[str]:
    """Work until nothing is left or the time is over; what went wrong beside the rows, in words.

    What hangs or takes its process with it has a row that says so. What the end of the time interrupts has none, so
    that the next call measures it.

    Args:
        log: what the workers print is appended to it.
        stopped: whether to end now.
    """
    living: list[subprocess.Popen] = []
    problems: list[str] = []
    replaced = 0
    with log.open("ab") as out:
        try:
            for _ in range(crew.workers):
                living.append(_start(crew, order, out.fileno()))
            while living and time.time() < order.until and not stopped():
                time.sleep(_POLL)
                for process in list(living):
                    hanging = _hangs(process.pid, order, crew.patience)
                    if hanging:
                        stop(process)
                        reason = f"stopped after {hanging:.0f} s"
                    elif process.poll() is None:
                        continue
                    else:
                        reason = f"failed: its process ended with {_name(process.returncode)} ({log.name})"
                    living.remove(process)
                    known = _fail(order, process.pid, reason) or process.returncode in (0, BROKEN)
                    if not known:
                        problems.append(f"a worker ended with {_name(process.returncode)} ({log.name})")
                    elif process.returncode and replaced < REPLACED:
                        replaced += 1
                        living.append(_start(crew, order, out.fileno()))
        finally:
            for process in living:
                stop(process)
    return list(dict.fromkeys(problems))


def _start(crew: Crew, order: Order, out: int) -> subprocess.Popen:
    return subprocess.Popen(
        crew.command,
        env={**os.environ, **crew.environment, **order.environment()},
        stdin=subprocess.DEVNULL,
        stdout=out,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # so that `stop` ends what it has started too
        preexec_fn=_die_with_parent if sys.platform == "linux" else None,
    )


def _die_with_parent() -> None:
    """In the child: when the parent is killed there is nobody to end it, and the next call appends to the same file."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def stop(process: subprocess.Popen) -> None:
    """End a process that was started with a session of its own, and its children."""
    with suppress(ProcessLookupError):  # it has ended by itself
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _hangs(process: int, order: Order, patience: float) -> float:
    """Seconds that a worker has been at the same, if they are too many; else 0."""
    try:
        taken = time.time() - opened(Path(order.folder), process).stat().st_mtime
    except FileNotFoundError:
        return 0.0
    return taken if taken > patience else 0.0


def _fail(order: Order, process: int, status: str) -> bool:
    """A row for what a worker was at, which no other takes in this call; False: it was at nothing."""
    being = opened(Path(order.folder), process)
    try:
        key = being.read_text(encoding="utf-8")
    except FileNotFoundError:
        return False
    being.unlink()
    take(Path(order.folder), key)
    Rows(Path(order.file), order.of).add(key, {"status": status})
    return True


def _name(status: int) -> str:
    """An exit status in words."""
    return f"status {status}" if status >= 0 else signal.Signals(-status).name

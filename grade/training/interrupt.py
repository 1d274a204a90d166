"""Stop between two steps, not inside one: a first Ctrl-C, SIGTERM or hang-up asks, a second Ctrl-C is at once."""

from __future__ import annotations

import os
import signal
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from grade.launch import processes_of

_TOLD_TWICE = 2.0
"""Seconds within which a second Ctrl-C is the first again, where a launcher has started several processes."""
_ASKING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class StopRequest:
    """Whether somebody has asked the run to stop.

    Attributes:
        asked: somebody has.
        first: what is still done before it stops, in words; it may change as the run goes on.
    """

    def __init__(self, first: str = "") -> None:
        self.asked, self.first = False, first


@contextmanager
def stop_between_steps(first: str) -> Iterator[StopRequest]:
    """Collect interrupts while the block runs. Outside the main thread, where Python has no signals, it never asks.

    Args:
        first: what is still done, said at once when a stop is asked for, such as "this step is finished and saved".
    """
    request, since = StopRequest(first), [0.0]
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def ask(number: int, frame: object) -> None:
        now = time.monotonic()
        # A launcher passes Ctrl-C on to processes that the terminal has told of it already.
        again = request.asked and (processes_of()[1] == 1 or now - since[0] > _TOLD_TWICE)
        if again and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not request.asked:
            since[0] = now
        if number == getattr(signal, "SIGHUP", None):
            _leave_terminal()
        elif not request.asked:
            _say(f"grade: stopping: {request.first} first. Ctrl-C again stops at once.")
        request.asked = True

    # A signal that whoever started the process has it ignore (nohup, a shell's background job) stays ignored.
    heard = [n for n in _ASKING if signal.getsignal(n) is not signal.SIG_IGN]
    previous = {number: signal.signal(number, ask) for number in heard}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _say(line: str) -> None:
    """A line on standard error from inside a signal handler, where Python's own streams may be in use; once for all
    processes of a run."""
    if processes_of()[0] == 0:
        with suppress(OSError):
            os.write(2, f"\n{line}\n".encode())


def _leave_terminal() -> None:
    """The terminal is gone: what is still printed goes nowhere, instead of failing."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        with suppress(OSError):
            if stat.S_ISCHR(os.fstat(stream).st_mode):  # a pipe or a file stays
                os.dup2(nowhere, stream)
    os.close(nowhere)

"""Stop between two steps, not inside one: a first Ctrl-C or SIGTERM asks, a second Ctrl-C interrupts at once."""

from __future__ import annotations

import signal
import threading
from contextlib import contextmanager
from typing import Iterator


class StopRequest:
    """Whether somebody has asked the run to stop."""

    def __init__(self) -> None:
        self.asked = False


@contextmanager
def stop_between_steps() -> Iterator[StopRequest]:
    """Collect interrupts while the block runs. Outside the main thread, where Python has no signals, it never asks."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def ask(number, frame):
        if request.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        request.asked = True

    # A signal that whoever started the process has it ignore (nohup, a shell's background job) stays ignored.
    heard = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) is not signal.SIG_IGN]
    previous = {number: signal.signal(number, ask) for number in heard}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)

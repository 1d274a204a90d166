"""Lines of a file or a named pipe, with an end to waiting and to a line."""

from __future__ import annotations

import os
import select
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

MOST_BYTES = 2**24
"""Of a line: far more than any response takes, far less than memory."""
_WAIT = 0.2  # seconds between two looks at whether a stop was asked
_READ = 2**16  # bytes
_SAID = {False: "gave nothing", True: "gave the beginning of a line and no more"}


class Silent(Exception):
    """No whole line has come in time; the text says what has."""


class TooLong(Exception):
    """A line does not end within `MOST_BYTES`."""


class StopAsked(Exception):
    """Whoever waits for a line was asked to stop."""


def lines_of(path: Path, *, timeout: float, should_stop: Callable[[], bool]) -> Iterator[bytes]:
    """Lines of a regular file, a pipe or a device, without their newlines. Nothing else ends a line.

    A pipe is opened without waiting for its writer. Its end before the first byte means that nobody has opened it yet
    (or somebody has, and said nothing): that is waited for too.

    Args:
        timeout: most seconds to wait for a line, from when it is asked for.
        should_stop: asked about five times a second while a line is waited for.

    Raises:
        Silent, TooLong, StopAsked: as they say.
        OSError: it cannot be opened or read.
    """
    file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        begun = not stat.S_ISFIFO(os.fstat(file).st_mode)
        rest, ended = b"", False
        while not ended:
            deadline = time.monotonic() + timeout
            pieces, size = [rest], len(rest)
            while True:
                more = _read(file)
                if more:
                    begun, size = True, size + len(more)
                    pieces.append(more)
                    if b"\n" in more:
                        break
                    if size > MOST_BYTES:
                        raise TooLong
                elif more is not None and begun:
                    ended = True
                    break
                if should_stop():
                    raise StopAsked
                left = deadline - time.monotonic()
                if left <= 0:
                    raise Silent(_SAID[bool(size)] if begun else "has no writer")
                if not more:
                    _wait(file, min(left, _WAIT), begun)
            *lines, rest = b"".join(pieces).split(b"\n")
            yield from lines
        if rest:
            yield rest
    finally:
        os.close(file)


def _read(file: int) -> bytes | None:
    """What is there; b"" at the end, None where there may be more later."""
    try:
        return os.read(file, _READ)
    except BlockingIOError:
        return None


def _wait(file: int, seconds: float, begun: bool) -> None:
    """Until there may be something to read."""
    if not begun:  # a pipe that nobody has opened is always ready, to say that it has ended
        time.sleep(min(seconds, _WAIT / 10))
        return
    poll = select.poll()
    poll.register(file, select.POLLIN)
    poll.poll(1000 * seconds)

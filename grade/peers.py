"""The processes of a run notice when one of them has ended, however that happened.

A collective of NCCL waits for a process that is dead until its timeout, which must be long, as processes may rightly
wait for each other. So the main process holds a connection to every other one, which the system closes when either
ends, also by a kill; a machine that is gone shows after a minute (TCP keep-alive). A heartbeat would instead take a
process for dead that only computes.
"""

from __future__ import annotations

import os
import secrets
import selectors
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

_CONNECT = 30.0
"""Seconds that the processes have to connect to each other."""
_GRACE = 15.0
"""Seconds that a process has to end by itself once another is gone; less than launchers wait before they kill."""
_GRACE_AFTER_ERROR = 600.0
"""The same where the other has ended by an error, or was stopped: so may this one, and still close its logs."""
_ALIVE = (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3))
_ENDED = 0xFFFF  # instead of a process' number: the run has ended well
_LEAVES = 0x8000  # added to the number of a process that ends by an error, and is not just gone


class Peers:
    """The connections of one process.

    Args:
        process, processes: which this is, of how many.
        exchange: the main process' value, in every process.
        any_process: whether something holds in any process.
        end: called in a thread with what to say, where a process has ended and this one still runs after a while: it
            must end the process.

    Attributes:
        lost: number of the process that has ended first; None: all are there.
        watched: whether all could be connected, and are watched.
    """

    def __init__(
        self,
        process: int,
        processes: int,
        exchange: Callable[[Any], Any],
        any_process: Callable[[bool], bool],
        end: Callable[[str], None] | None = None,
    ):
        self._process, self._processes = process, processes
        self._end = end or _end_process
        self.lost: int | None = None
        self._found, self._closed = threading.Event(), threading.Event()
        self._connections: dict[int, socket.socket] = {}
        self._thread: threading.Thread | None = None
        self.watched = not any_process(not self._connected(exchange))
        if not self.watched:
            self._close()
            return
        selector = selectors.DefaultSelector()
        for other, connection in self._connections.items():
            selector.register(connection, selectors.EVENT_READ, other)
        self._thread = threading.Thread(target=self._watch, args=(selector,), name="grade-peers", daemon=True)
        self._thread.start()

    def __str__(self) -> str:
        """What has happened, once one is lost."""
        who = "the main process" if self.lost == 0 else f"process {self.lost} of {self._processes}"
        return (
            f"{who} has ended, and the others cannot go on without it: what it said last, or the system, tells why. "
            "What had been saved is kept."
        )

    def noticed(self, seconds: float) -> bool:
        """Whether a process has ended, or is seen to have within so many seconds."""
        return self.watched and self._found.wait(seconds)

    def leave(self, well: bool) -> None:
        """End the watch.

        Args:
            well: all processes end together; otherwise the others take this one's end for a loss.
        """
        self._closed.set()
        for connection in self._connections.values():  # all, before any of the others sees the connection's end
            _tell(connection, _ENDED if well else _LEAVES + self._process)
        for connection in self._connections.values():
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)  # wakes the thread
        if self._thread is not None:
            self._thread.join(1.0)
        self._close()

    def _close(self) -> None:
        for connection in self._connections.values():
            connection.close()

    def _connected(self, exchange: Callable[[Any], Any]) -> bool:
        """Whether the main process is connected with all others, and another one with it."""
        if self._process:
            host, port, secret = exchange(None)
            if port is None:
                return False
            try:
                connection = socket.create_connection((os.environ.get("MASTER_ADDR", host), port), _CONNECT)
                connection.sendall(secret + self._process.to_bytes(2, "big"))
                self._connections[0] = _kept_alive(connection)
            except OSError:
                return False
            return True
        secret = secrets.token_bytes(16)
        try:
            server = _server()
        except OSError:
            exchange((None, None, None))
            return False
        with server:
            exchange((socket.gethostname(), server.getsockname()[1], secret))
            server.settimeout(_CONNECT)
            with suppress(OSError):  # a timeout is one
                while len(self._connections) < self._processes - 1:
                    connection, _ = server.accept()
                    connection.settimeout(_CONNECT)
                    said = _received(connection, len(secret) + 2)
                    if secrets.compare_digest(said[: len(secret)], secret):
                        number = int.from_bytes(said[len(secret) :], "big")
                        self._connections[number] = _kept_alive(connection)
                    else:  # nobody of ours
                        connection.close()
        return len(self._connections) == self._processes - 1

    def _watch(self, selector: selectors.BaseSelector) -> None:
        with selector:
            while selector.get_map():
                for key, _ in selector.select():
                    try:
                        said = _received(self._connections[key.data], 2)
                    except OSError:
                        said = b""
                    number = int.from_bytes(said, "big") if len(said) == 2 else key.data
                    if number == _ENDED:
                        selector.unregister(key.fileobj)
                        continue
                    if not self._closed.is_set():  # else this one has just closed it itself
                        self._lose(number)
                    return

    def _lose(self, number: int) -> None:
        """Note a process' end, tell it and, after a while, end this one. `number` may have `_LEAVES` added."""
        self.lost = number % _LEAVES
        self._found.set()
        if self._process == 0:  # the others see only this process' end
            for connection in self._connections.values():
                _tell(connection, number)
        if not self._closed.wait(_GRACE_AFTER_ERROR if number >= _LEAVES else _GRACE):
            self._end(str(self))


def _server() -> socket.socket:
    """On every address of this machine."""
    if socket.has_dualstack_ipv6():
        with suppress(OSError):  # there may be no such address
            return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _kept_alive(connection: socket.socket) -> socket.socket:
    """The connection, which waits without a limit, and breaks where the other machine is gone."""
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _ALIVE:
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return connection


def _received(connection: socket.socket, size: int) -> bytes:
    """So many bytes, or fewer where the connection has been closed."""
    said = b""
    while len(said) < size and (part := connection.recv(size - len(said))):
        said += part
    return said


def _tell(connection: socket.socket, number: int) -> None:
    with suppress(OSError):
        connection.sendall(number.to_bytes(2, "big"))


def _end_process(why: str) -> None:
    """From a thread, and whatever the main one waits for."""
    with suppress(OSError):
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"grade: error: {why}\n".encode())
    os._exit(2)

"""One question in JSON to an HTTP server, and its answer, by the standard library.

Every question has a connection of its own, so that threads share nothing. Proxies are not asked, and redirections are
not followed: an answer comes from the address that was named or not at all.
"""

from __future__ import annotations

import http.client
import json
import ssl
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from grade.errors import failure_of

_CONNECT = 10.0  # seconds in which a server that runs accepts a connection
_MOST_BYTES = 2**28  # of an answer: far more than any response takes, far less than memory


class Unreachable(Exception):
    """No connection could be made: the server does not run, or not yet."""


class Broken(Exception):
    """The connection ended, or was silent for too long, before the whole answer had come."""


class Answer(NamedTuple):
    """What a server said.

    Args:
        status: of HTTP.
        content: the parsed JSON; None if it was none.
        text: the beginning of what came, for messages.
    """

    status: int
    content: Any
    text: str


class JsonServer:
    """A server at an address.

    Args:
        url: http or https, a host, and a port and a path or not.
        key: sent as a bearer token, and never part of a message.
        timeout: seconds of silence after which an answer is no longer waited for.
    """

    def __init__(self, url: str, *, key: str | None = None, timeout: float):
        address = urlsplit(url)
        self.url, self._host, self._port = url, address.hostname or "", address.port
        self._secure, self._path = address.scheme == "https", address.path.rstrip("/")
        self._headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if key:
            self._headers["Authorization"] = f"Bearer {key}"
        self._timeout = timeout

    def get(self, path: str) -> Answer:
        """Raises `Unreachable` or `Broken`."""
        return self._ask("GET", path, None)

    def post(self, path: str, body: dict[str, Any]) -> Answer:
        """Raises `Unreachable` or `Broken`."""
        return self._ask("POST", path, json.dumps(body).encode())

    def _ask(self, method: str, path: str, body: bytes | None) -> Answer:
        connection = self._connected()
        try:
            connection.request(method, self._path + path, body, self._headers)
            response = connection.getresponse()
            content = response.read(_MOST_BYTES + 1)
        except TimeoutError:
            raise Broken(f"it gave no answer in {self._timeout:g} seconds") from None
        except (OSError, http.client.HTTPException) as error:
            raise Broken(f"the connection broke ({_reason(error)})") from None
        finally:
            connection.close()
        if len(content) > _MOST_BYTES:
            raise Broken(f"its answer has more than {_MOST_BYTES} bytes")
        if response.length:  # bytes that were announced and did not come
            raise Broken("the connection broke in the middle of an answer")
        text = content.decode("utf-8", "replace")
        try:
            parsed = json.loads(text)
        except (ValueError, RecursionError):
            parsed = None
        return Answer(response.status, parsed, text[:200])

    def _connected(self) -> http.client.HTTPConnection:
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        connection = kind(self._host, self._port, timeout=min(_CONNECT, self._timeout))
        try:
            connection.connect()
        except ssl.SSLError as error:
            raise Unreachable(f"no secure connection ({_reason(error)})") from None
        except (OSError, UnicodeError) as error:  # the latter of a host that no name can be, such as a..b
            raise Unreachable(_reason(error)) from None
        connection.sock.settimeout(self._timeout)
        return connection


def _reason(error: Exception) -> str:
    return failure_of(error)

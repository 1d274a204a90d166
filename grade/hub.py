"""Whether the hub answers, and loading what may be there without waiting for a hub that does not."""

from __future__ import annotations

import importlib.util
import os
import ssl
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

HUB_TIMEOUT = 3.0  # seconds
_PATIENCE = 8.0
"""Seconds after which a hub that is silent is not asked for files either."""
_REMEMBERED = 60.0
"""Seconds for which an answer, or none, is remembered."""
_asked: dict[str, tuple[float, bool]] = {}


def check_hub(timeout: float = HUB_TIMEOUT) -> dict[str, Any]:
    """Whether the hub answers: {"reachable": bool, or None in offline mode, "detail": text}."""
    if _offline():
        return {"reachable": None, "detail": "HF_HUB_OFFLINE is set: not asked"}
    endpoint = _endpoint()
    if endpoint is None:
        return {"reachable": False, "detail": "huggingface_hub is missing: pip install huggingface_hub"}
    try:
        _ask(endpoint, timeout)
    except urllib.error.HTTPError as error:
        return {"reachable": False, "detail": f"{endpoint} answers {error.code} {error.reason}"}
    except (OSError, ValueError) as error:
        return {"reachable": False, "detail": f"{endpoint}: {getattr(error, 'reason', error)}"}
    return {"reachable": True, "detail": endpoint}


@contextmanager
def without_waiting() -> Iterator[None]:
    """Where the hub cannot be connected to, its libraries read only their caches in the block, and refuse at once what
    these lack: they would try for a minute or more."""
    endpoint = _endpoint()
    if _offline() or endpoint is None or _connects(endpoint):
        yield
        return
    from huggingface_hub import constants

    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    datasets = sys.modules.get("datasets.config")
    if datasets is not None:
        datasets.HF_HUB_OFFLINE = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
        datasets = sys.modules.get("datasets.config")
        if datasets is not None:
            datasets.HF_HUB_OFFLINE = before  # type: ignore[attr-defined]


def _offline() -> bool:
    return any(os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE") for name in _OFFLINE)


_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")


def _endpoint() -> str | None:
    """Address of the hub: HF_ENDPOINT, or what huggingface_hub was built with."""
    if importlib.util.find_spec("huggingface_hub") is None:
        return None
    from huggingface_hub import constants

    return os.environ.get("HF_ENDPOINT") or constants.ENDPOINT


def _connects(endpoint: str) -> bool:
    """Whether anything is there, as far as is known of the last minute. An answer of any kind counts, and so does what
    the libraries may do otherwise: a certificate that is not known here, an address of another form."""
    asked = _asked.get(endpoint)
    if asked is None or time.monotonic() - asked[0] > _REMEMBERED:
        connects = True
        try:
            _ask(endpoint, _PATIENCE)
        except (urllib.error.HTTPError, ValueError):
            pass
        except OSError as error:
            connects = isinstance(getattr(error, "reason", error), ssl.SSLError)
        asked = _asked[endpoint] = time.monotonic(), connects
    return asked[1]


def _ask(endpoint: str, timeout: float) -> None:
    """Return if the hub answers well.

    Never takes longer than `timeout` seconds: looking a name up has no timeout of its own, so the request runs in a
    thread that is left behind when it does not come back.

    Raises:
        urllib.error.HTTPError: it answers otherwise.
        OSError: it does not answer.
        ValueError: that is no address.
    """
    found: list[BaseException | None] = []

    def ask() -> None:
        try:
            with urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=timeout):
                found.append(None)
        except (OSError, ValueError) as error:
            found.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout)
    error = found[0] if found else TimeoutError(f"no answer in {timeout:g} s")
    if error is not None:
        raise error

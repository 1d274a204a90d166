"""Which of several ways to compute the same is the quickest on this machine: measured once, and remembered on disk.

The libraries' products differ from processor to processor by more than a factor of two, in either direction, so no
number written here would be right on another machine.  Ways also round differently.  Were they measured anew by every
process, a resumed run could take another one than the run before and differ in last digits.  So what was measured
stays in the user's cache folder, and every later process on the machine decides by the same seconds; who keeps what
`record` gives, as a checkpoint does, decides by them even without that folder.
"""

from __future__ import annotations

import json
import math
import os
import platform
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path

import torch

try:
    import fcntl
except ImportError:  # Windows, where processes that ask at once may each measure
    fcntl = None  # type: ignore[assignment]

VARIABLE = "GRADE_KERNELS_MEASURED"
"""The environment variable that names another folder than `~/.cache/grade_kernels` for what was measured."""
ADVANTAGE = 0.9
"""Another way than the plain one is taken if it needs at most this share of its time: less is a clock's noise."""
Seconds = dict[str, float]
_FILE = "products.json"
_LARGEST = 2**24  # bytes that no file of ours reaches
_SECONDS = 0.5  # no further round beyond these
# What makes the libraries take other kernels on the same processor.
_CHOOSING = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS")

_known: dict[str, Seconds] = {}  # of this process
_holder = threading.local()  # whether its thread holds the lock

# On a machine that others use, time on the wall has their share. Windows counts a thread's in ticks of 16 ms.
_FINEST = 1e-5
_clock = time.thread_time if time.get_clock_info("thread_time").resolution <= _FINEST else time.perf_counter


def seconds_of(what: str, ways: Mapping[str, Callable[[], object]], rounds: int = 7) -> Seconds:
    """Processor seconds of each way: the least of some calls in turns, now or when this machine was first asked.

    They are those of the thread that calls. A way may itself ask for the seconds of others.

    Parameters
    ----------
    what : str
        What they compute, with shapes and dtype; the machine, the libraries and the threads are added here.
    ways : by name
        The same names for the same `what`.
    """
    key = f"{what}; {_machine()}"
    if key in _known and set(_known[key]) == set(ways):
        return _known[key]
    with _held():
        found = _read().get(key, {})
        if set(found) != set(ways):
            found = _measure(ways, rounds)
            kept = {**_read(), key: found}  # read after that, since a way may have measured, too
            with suppress(OSError, RuntimeError):  # a folder that cannot be written: this process still decides once
                _write(_folder() / _FILE, json.dumps(kept, indent=0) + "\n")
        _known[key] = found
    return found


def quickest(what: str, ways: Mapping[str, Callable[[], object]]) -> str:
    """The name of the quickest; the first one unless another saves more than a tenth (`ADVANTAGE`)."""
    seconds, plain = seconds_of(what, ways), next(iter(ways))
    best = min(ways, key=seconds.__getitem__)
    return best if seconds[best] <= ADVANTAGE * seconds[plain] else plain


def record() -> dict[str, Seconds]:
    """What this process decided by, ready for JSON."""
    return dict(_known)


def restore(recorded: Mapping[str, Seconds]) -> None:
    """Decide by what another process did, as far as it was on such a machine.

    Raises
    ------
    ValueError
        It is not what `record` gives.
    """
    sound = _sound(recorded)
    if sound != recorded:
        raise ValueError(f"what was measured must be seconds by names, got {recorded!r:.200}")
    _known.update(sound)


def _folder() -> Path:
    """Raises RuntimeError where there is no home folder."""
    chosen = os.environ.get(VARIABLE)
    if chosen:
        return Path(chosen)
    # An empty or relative one counts as unset, as its specification demands.
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "grade_kernels"


def _measure(ways: Mapping[str, Callable[[], object]], rounds: int) -> Seconds:
    least = dict.fromkeys(ways, math.inf)
    for call in ways.values():
        call()  # loads what is loaded lazily
    start = _clock()
    for _ in range(rounds):
        for name, call in ways.items():
            before = _clock()
            call()
            least[name] = min(least[name], _clock() - before)
        if _clock() - start > _SECONDS:
            break
    return least


@contextmanager
def _held() -> Iterator[None]:
    """Two processes that ask at once measure once; without a folder to lock in, each does."""
    if getattr(_holder, "holds", False):  # a way asks while it is measured: a second lock would wait for the first
        yield
        return
    with ExitStack() as stack:
        with suppress(OSError, RuntimeError):
            folder = _folder()
            folder.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context((folder / "products.lock").open("a"))
            if fcntl is not None:
                fcntl.flock(lock, fcntl.LOCK_EX)  # until it is closed
        _holder.holds = True
        stack.callback(setattr, _holder, "holds", False)
        yield


def _write(path: Path, text: str) -> None:
    """As a whole or not at all."""
    file = tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8")
    try:
        with file:
            file.write(text)
        os.replace(file.name, path)
    except OSError:
        os.unlink(file.name)
        raise


def _read() -> dict[str, Seconds]:
    """What was measured before; nothing of a file that is missing or damaged, which is then measured anew."""
    try:
        path = _folder() / _FILE
        if not path.is_file() or path.stat().st_size > _LARGEST:  # reading a pipe might never end
            return {}
        kept = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RuntimeError):  # RuntimeError: no home folder, or nested too deeply
        return {}
    return _sound(kept)


def _sound(kept: object) -> dict[str, Seconds]:
    """The part of it that may be what `seconds_of` found."""
    found = {}
    for key, ways in kept.items() if isinstance(kept, dict) else ():
        if isinstance(ways, dict) and all(isinstance(x, float) and 0 <= x < math.inf for x in ways.values()):
            found[key] = ways
    return found


@cache
def _processor() -> str:
    """Its names and numbers: the model's name alone may hide which generation it is."""
    found: dict[str, str] = {}
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("vendor_id", "cpu family", "model", "model name"):
                found.setdefault(name.strip(), value.strip())
    return " ".join(found.values()) or platform.processor() or platform.machine()


def _machine() -> str:
    switches = [f"{name}={os.environ[name]}" for name in _CHOOSING if name in os.environ]
    capability = torch.backends.cpu.get_cpu_capability()
    torch_name = f"torch {torch.__version__}"
    return ", ".join([_processor(), torch_name, capability, f"{torch.get_num_threads()} threads", *switches])

"""Which of several ways to compute the same is the quickest on this machine: measured once, and remembered on disk.

The libraries' products differ from processor to processor by more than a factor of two, in either direction, so no
number written here would be right on another machine. Ways also round differently. Were they measured anew by every
process, a resumed run could take another one than the run before and differ in last digits. So what was measured
stays in the user's cache folder, and every later process on the machine decides by the same seconds.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import lru_cache
from pathlib import Path

import torch

from grade.errors import GradeError
from grade.files import locked, replace_text
from grade.machine import cache_folder, cpu_name

VARIABLE = "GRADE_MEASURED"
"""The environment variable that names another folder than `grade.machine.cache_folder` for what was measured."""
ADVANTAGE = 0.9
"""Another way than the plain one is taken if it needs at most this share of its time: less is a clock's noise."""
_FILE = "products.json"
_ROUNDS = 7
_SECONDS = 0.5  # no further round beyond these
# What makes the libraries take other kernels on the same processor.
_CHOOSING = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS")

_known: dict[str, dict[str, float]] = {}  # of this process


def seconds_of(what: str, ways: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Processor seconds of each way: the least of some calls in turns, now or when this machine was first asked.

    Args:
        what: what they compute, with shapes and dtype; the machine, the libraries and the threads are added here.
        ways: the same names for the same `what`.
    """
    key = f"{what}; {_machine()}"
    if key in _known and set(_known[key]) == set(ways):
        return _known[key]
    with _held():
        kept = _read()
        if set(kept.get(key, ())) != set(ways):
            kept[key] = _measure(ways)
            with suppress(OSError):  # a folder that cannot be written: this process still decides once
                replace_text(_folder() / _FILE, json.dumps(kept, indent=0) + "\n")
        _known[key] = kept[key]
    return _known[key]


def quickest(what: str, ways: Mapping[str, Callable[[], object]]) -> str:
    """The name of the quickest; the first one unless another saves more than a tenth (`ADVANTAGE`)."""
    seconds, plain = seconds_of(what, ways), next(iter(ways))
    best = min(ways, key=seconds.__getitem__)
    return best if seconds[best] <= ADVANTAGE * seconds[plain] else plain


def _folder() -> Path:
    chosen = os.environ.get(VARIABLE)
    return Path(chosen) if chosen else cache_folder()


def _measure(ways: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    least = dict.fromkeys(ways, math.inf)
    for call in ways.values():
        call()  # loads what is loaded lazily
    start = time.thread_time()
    for _ in range(_ROUNDS):
        for name, call in ways.items():
            before = time.thread_time()  # on a machine that others use a clock would tell their share
            call()
            least[name] = min(least[name], time.thread_time() - before)
        if time.thread_time() - start > _SECONDS:
            break
    return least


@contextmanager
def _held() -> Iterator[None]:
    """Two processes that ask at once measure once; without a folder to lock in, each does."""
    folder = _folder()
    with ExitStack() as stack:
        with suppress(GradeError, OSError):
            folder.mkdir(parents=True, exist_ok=True)
            lock = folder / "products.lock"
            stack.enter_context(locked(lock, VARIABLE, f"{folder} is in use", wait=lambda: None))
        yield


def _read() -> dict[str, dict[str, float]]:
    """What was measured before; nothing of a file that is missing or damaged, which is then measured anew."""
    try:
        kept = json.loads((_folder() / _FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    found = {}
    for key, ways in kept.items() if isinstance(kept, dict) else ():
        if isinstance(ways, dict) and all(isinstance(x, float) and 0 <= x < math.inf for x in ways.values()):
            found[key] = ways
    return found


@lru_cache(maxsize=1)
def _processor() -> str:
    return f"{cpu_name()}, torch {torch.__version__}"


def _machine() -> str:
    told = [f"{name}={os.environ[name]}" for name in _CHOOSING if name in os.environ]
    capability = torch.backends.cpu.get_cpu_capability()
    return ", ".join([_processor(), capability, f"{torch.get_num_threads()} threads", *told])

"""Products with a float32 weight on a CPU, by the quicker of torch's two libraries for them.

torch multiplies float32 matrices by MKL, which does not take the widest vectors of every processor: on one with AVX-512
that is not Intel's, oneDNN, which torch brings too, was 2.4 times as fast.  oneDNN may first bring the weight into a
layout of its own, and makes code for every size, so that it pays from some number of rows and some amount of work on.
Where that is, a measurement of a few hundredths of a second says, once a processor and version of torch: the choice
decides how sums are rounded, so it is kept in a file, and the same seed gives the same numbers in the next process too.
"""

from __future__ import annotations

import json
import math
import os
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

VARIABLE = "GRADE_KERNELS_CPU_PRODUCTS"
"""`mkl` or `onednn` takes that one for every product that both can make."""

# A weight in the caches, the rows that it multiplies, and a weight larger than most caches, the slowest to lay out.
_WEIGHT, _ROWS, _LARGE = (512, 256), 256, (16384, 256)
_REPEATS = 20
# A size is met as often as this at least: a model's layers have equal ones.
_USES = 8
# As much faster must oneDNN be: where both are about equal, noise would choose.
_GAIN = 1.25


@dataclass(frozen=True)
class Limits:
    """From where on oneDNN is taken: a product of that many rows, and of that many multiplications.

    Powers of two, since times differ from one measurement to the next.
    """

    rows: float
    work: float


_ALWAYS = Limits(1.0, 1.0)
_restored: list[Limits | None] = []


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x [r, i] @ weight.T [i, o] -> [r, o], by the quicker library; without a graph.

    `weight` may be a transposed view.  Where oneDNN multiplies, a copy of the weight may be alive meanwhile.
    """
    if takes_onednn(x, weight):
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return x @ weight.T


def takes_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether `product` of x [..., i], as [r, i], and `weight` [o, i] is oneDNN's."""
    able = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and x.numel() > 0
    if not able or torch.compiler.is_compiling():  # a compiler makes products its own way
        return False
    rows, least = x.numel() // x.shape[-1], limits()
    return least is not None and rows >= least.rows and rows * weight.numel() >= least.work


def limits() -> Limits | None:
    """Those of this processor and torch; None where oneDNN is never taken.

    Raises
    ------
    ValueError
        The environment variable has another value.
    """
    forced = os.environ.get(VARIABLE, "")
    if forced not in ("", "mkl", "onednn"):
        raise ValueError(f"{VARIABLE} must be 'mkl' or 'onednn', or unset to measure, got {forced!r}")
    if forced == "mkl" or not torch.backends.mkldnn.is_available():
        return None
    if forced == "onednn":
        return _ALWAYS
    return _restored[-1] if _restored else kept_limits()


def restore(recorded: dict[str, float] | None) -> None:
    """Take the limits of an earlier process in place of measured ones."""
    _restored[:] = [_limits_of(recorded)]


def record() -> dict[str, float] | None:
    """What `restore` takes, ready for JSON."""
    return _recorded(limits())


@cache
def kept_limits() -> Limits | None:
    """The limits in this user's file for this processor, torch and what switches their instructions; if they are not
    there, they are measured and written."""
    switches = [f"{k}={v}" for k, v in sorted(os.environ.items()) if k.startswith(("MKL_", "ONEDNN_", "DNNL_"))]
    key = ", ".join((_processor(), torch.__version__, torch.backends.cpu.get_cpu_capability(), *switches))
    path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "grade_kernels" / "cpu_products.json"
    kept = _read(path)
    if key in kept:
        return kept[key]
    found = measured_limits()
    _write(path, {**kept, key: found})
    return found


def measured_limits() -> Limits | None:
    """Times both libraries in turns, and takes of each the best time, which other programs disturb least.

    By one thread: where several share a busy machine, they wait for each other, and the times say nothing.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _by_one_thread()
    finally:
        torch.set_num_threads(threads)


def _by_one_thread() -> Limits | None:
    with torch.no_grad():
        weight, large = torch.ones(_WEIGHT), torch.ones(_LARGE)
        rows = torch.ones(_ROWS + _REPEATS, _WEIGHT[1])

        def onednn(n: int, weight: Tensor) -> Callable[[], Tensor]:
            return lambda: torch.ops.mkldnn._linear_pointwise(rows[:n], weight, None, "none", [], "")

        def turn(n: int) -> list[float]:
            runs = (lambda: rows[:_ROWS] @ weight.T, onednn(_ROWS, weight), onednn(n, weight), onednn(1, large))
            return [_seconds(run) for run in runs]

        turn(_ROWS)  # what is loaded or made at first use
        turns = [turn(_ROWS + 1 + number) for number in range(_REPEATS)]
    # `first` is of a size not seen before; `one` is what one row costs, which is all that a weight costs by itself.
    mkl, other, first, one = (min(times) for times in zip(*turns, strict=True))
    if mkl < _GAIN * other:
        return None
    saved = (mkl - other) / (_ROWS * math.prod(_WEIGHT))  # a multiplication
    by_entry, making = one / math.prod(_LARGE), max(first - other, 0.0)
    return Limits(_power_above(by_entry / saved), _power_above(making / saved / _USES))


def _power_above(x: float) -> float:
    return 2.0 ** math.ceil(math.log2(max(x, 1.0)))


def _seconds(run: Callable[[], Tensor]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    wanted = ("vendor_id", "cpu family", "model", "model name")  # the last one may hide the first ones
    found = dict(line.split(":", 1) for line in reversed(lines) if ":" in line)
    return " ".join(value.strip() for name, value in sorted(found.items()) if name.strip() in wanted)


def _recorded(limits: Limits | None) -> dict[str, float] | None:
    return None if limits is None else asdict(limits)


def _limits_of(recorded: dict[str, float] | None) -> Limits | None:
    return None if recorded is None else Limits(float(recorded["rows"]), float(recorded["work"]))


def _read(path: Path) -> dict[str, Limits | None]:
    """Empty where there is none, or it is of another form: it is written again."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {key: _limits_of(each) for key, each in found.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _write(path: Path, kept: dict[str, Limits | None]) -> None:
    """As a whole or not at all; a folder that cannot be written costs the next process a measurement."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
            json.dump({key: _recorded(each) for key, each in kept.items()}, file)
        os.replace(file.name, path)
    except OSError:
        return

"""A worker of the kernel table: the rows of `python -m benchmarks.kernels`, each kept when it has been measured.

With --warm nothing is measured: several workers share the set-ups and run each once on few rows, so that compiled
kernels are in Triton's cache before the one that measures asks for them.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from benchmarks import kernel_setup
from benchmarks.gpu.machine import device_answers
from benchmarks.gpu.summary import SEE_ROWS
from benchmarks.gpu.training import entries
from benchmarks.gpu.work import BROKEN, Work, ordered
from benchmarks.kernel_cases import Case, cases
from benchmarks.kernel_rows import Row, failure, name_of, one_line, run_case
from benchmarks.kernel_setup import Sizes
from benchmarks.kernels import DTYPES, budget, sizes_for
from benchmarks.measure import Machine

WARM_ROWS = 1024
"""Kernels are compiled for the sizes of a row, and for few rows and many; this is many."""
DRY_SIZES = Sizes(12, 384, 16, 8, (1,), 384, 2)
DRY_KERNELS = ("token_logprob", "scatter_tokens")
COPY = "copy bandwidth"


class TimeIsUp(Exception):
    """What is next is not begun."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--warm", action="store_true")
    parser.add_argument("passes", nargs="+", metavar="DTYPE[+compile]", help="with torch.compile too; in this order")
    options = parser.parse_args()
    machine, work = Machine("cpu" if options.dry else "cuda"), Work(ordered())
    sizes = DRY_SIZES if options.dry else sizes_for(machine, quick=False)
    if options.warm:
        warm(options.passes, sizes, machine, work)
        return 0
    return measure(options.passes, sizes, machine, work)


Task = tuple[Case, torch.dtype, bool]
"""Set-up, dtype, and whether torch.compile is measured too."""


def tasks_of(passes: list[str], sizes: Sizes, dry: bool) -> dict[str, Task]:
    """By key, the vocabulary of Qwen3 first; what is measured in one dtype alone is there once."""
    tasks: dict[str, Task] = {}
    chosen = [case for case in cases(sizes) if not dry or case.kernel in DRY_KERNELS]
    chosen.sort(key=lambda case: case.decode)
    for name in passes:
        dtype_name, _, compiling = name.partition("+")
        seen: dict[str, int] = {}
        for case in chosen:
            seen[case.kernel] = seen.get(case.kernel, 0) + 1
            dtype = case.only or DTYPES[dtype_name]
            key = f"set-up {case.kernel} {seen[case.kernel]} {name_of(dtype)} {compiling}".strip()
            tasks.setdefault(key, (case, dtype, bool(compiling)))
    return tasks


def measure(passes: list[str], sizes: Sizes, machine: Machine, work: Work) -> int:
    """Measure what is missing; the exit status."""
    tasks = tasks_of(passes, sizes, work.order.dry)
    work.plan(list(tasks))
    seconds = 1e-3 if work.order.dry else budget(machine, quick=False)
    if work.begin(COPY):
        bandwidth = machine.copy_bandwidth(2**20 if work.order.dry else None)
        work.done(COPY, {"status": "ok", "gb_s": bandwidth})
    if (copy := work.rows.kept(COPY)) is None:
        return 0

    def before(row: Row) -> Row | None:
        key = key_of(row)
        if (kept := work.rows.kept(key)) is not None:
            return kept
        if work.begin(key):
            return None
        if work.time_is_up():
            raise TimeIsUp
        return work.rows.latest[key]  # it took its process with it in this call

    for key in sorted(tasks, key=work.is_again):
        case, dtype, compiling = tasks[key]
        if not work.enter(key):
            continue
        again = False
        try:
            for row in run_case(case, sizes, dtype, machine, copy["gb_s"], seconds, compiling, before):
                if "key" not in row:
                    row = work.done(key_of(row), {**row, "copy_gb_s": copy["gb_s"]})
                    show(row)
                    if row["status"].startswith("failed") and not device_answers():
                        return BROKEN
                again |= work.rows.kept(row["key"]) is None
        except TimeIsUp:
            return 0
        except Exception as problem:  # the inputs or their float64 truth
            work.done(key, {**failure(case, dtype, machine, f"failed: {one_line(problem)}")})
            if not device_answers():
                return BROKEN
            continue
        work.done(key, {"status": SEE_ROWS if again else "ok"})
    return 0


def key_of(row: Row) -> str:
    return " ".join(str(row[name]) for name in ("kernel", "variant", "dtype", "implementation", "shape")).strip()


def show(row: Row) -> None:
    """A line for the log."""
    said = f"{row['ms']:.3f} ms, {row['gb_s']:.0f} GB/s" if row["status"] == "ok" else row["status"]
    print(f"{row['key']}: {said}", flush=True)


def warm(passes: list[str], sizes: Sizes, machine: Machine, work: Work) -> None:
    """Compile, by running them on few rows: first training steps, then ours of the set-ups in their order."""
    few = replace(sizes, rows=min(sizes.rows, WARM_ROWS))
    for algorithm in ("layers", "replay"):  # what takes the longest first
        if work.begin(f"training {algorithm}"):
            _timed(f"training {algorithm}", work, partial(_train, algorithm))
    for key, (case, dtype, _) in tasks_of(passes, few, work.order.dry).items():
        if work.begin(key):
            _timed(key, work, partial(_run, case, few, dtype, machine))


def _timed(key: str, work: Work, first: Callable[[], object]) -> None:
    began = time.monotonic()
    try:
        first()
    except Exception as problem:  # what cannot run is reported where it is measured
        work.done(key, {"status": f"failed: {one_line(problem)}"})
        return
    work.done(key, {"status": "ok", "seconds": round(time.monotonic() - began, 3)})


def _run(case: Case, sizes: Sizes, dtype: torch.dtype, machine: Machine) -> None:
    setup = case.build(sizes, dtype, machine.device)
    for run in setup.runs:
        if run.name == "ours" and not run.missing:
            kernel_setup.start(run, setup.arguments, run.cotangents())()
    machine.synchronize()
    machine.clear()


def _train(algorithm: str) -> None:
    """A short step of one decoder layer: its kernels are those of the whole model, and so is the layer's code."""
    from benchmarks.training_setup import Bench

    Bench(entries(ordered().dry)[0].setting(layers=1), algorithm).step()


if __name__ == "__main__":
    sys.exit(main())

"""The rows of the kernel benchmark: every implementation of a set-up is checked, then timed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from benchmarks import kernel_setup
from benchmarks.kernel_cases import Case
from benchmarks.kernel_setup import Run, Setup, Sizes
from benchmarks.measure import Machine, Times
from grade.memory.peak import peak_bytes

COLUMNS = (
    "kernel",
    "variant",
    "implementation",
    "backend",
    "shape",
    "dtype",
    "device",
    "ms",
    "ms_p20",
    "ms_p80",
    "repetitions",
    "bytes",
    "bytes_formula",
    "gb_s",
    "copy_percent",
    "tflop_s",
    "peak_mb",
    "ratio",
    "error",
    "goal",
    "goal_met",
    "status",
    "note",
)
# Share of the free memory that an estimate may take.
FITS = 0.9
Row = dict[str, Any]


class OutOfMemory(Exception):
    """An implementation does not fit; says how much it needs."""


class Wrong(Exception):
    """An implementation's result is not the textbook's."""


def measure(setup: Setup, run: Run, machine: Machine, seconds: float) -> tuple[Times, int | None, float]:
    """(times, peak bytes above the inputs, error) of one implementation.

    Raises
    ------
    OutOfMemory, Wrong
    Exception
        Whatever the implementation raises.
    """
    free = machine.free_bytes()
    if free is not None and run.needs > FITS * free:
        raise OutOfMemory(f"needs {run.needs / 2**30:.1f} GB above its inputs, {free / 2**30:.1f} GB are free")
    try:
        cotangents = run.cotangents()
        steps: list[Callable] = []

        def first() -> Any:
            steps.append(kernel_setup.start(run, setup.arguments, cotangents))
            return steps[0]()

        # Compiled code does its allocations out of sight on a CPU, and PyTorch does not compile under a dispatch mode.
        if run.compile and not machine.is_gpu:
            outputs, peak = first(), None
        else:
            outputs, peak = peak_bytes(first, machine.device)
        error = setup.error(run.view(outputs, setup.rows))
        if not error <= setup.tolerance:
            raise Wrong(f"wrong: relative error {error:.2g} against float64, allowed {setup.tolerance:.0e}; not timed")
        del outputs
        step = machine.graph(steps[0]) if run.graph else steps[0]
        return machine.time(step, seconds), peak, error
    except (torch.OutOfMemoryError, MemoryError) as problem:
        raise OutOfMemory(f"out of memory: {one_line(problem)}") from None


def one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:200]


def rows_of(
    setup: Setup, machine: Machine, copy: float, seconds: float, before: Callable[[Row], Row | None] = lambda row: None
) -> Iterator[Row]:
    """One row an implementation.

    Args:
        copy: the copy bandwidth in GB/s.
        before: called with what says which row is next; the row that is there already, which is not measured again.
    """
    ours = None
    for run in setup.runs:
        row: Row = dict.fromkeys(COLUMNS, "") | {
            "kernel": setup.kernel,
            "variant": setup.variant,
            "implementation": run.name,
            "backend": run.backend,
            "shape": setup.shape,
            "dtype": name_of(setup.dtype),
            "device": machine.name,
            "bytes": setup.moved,
            "bytes_formula": setup.formula,
            "goal": str(run.goal or "") if machine.is_gpu else "",
            "note": run.note,
        }
        if (there := before(row)) is not None:
            if run.name == "ours" and there["status"] == "ok":
                ours = there["ms"]
            yield there
            continue
        if run.missing:
            yield row | {"status": f"skipped: {run.missing}"}
            continue
        try:
            times, peak, error = measure(setup, run, machine, seconds)
        except OutOfMemory as problem:
            row["status"] = str(problem)
        except Wrong as problem:
            row["status"] = str(problem)
        except Exception as problem:  # a row, so that the other implementations are measured
            row["status"] = f"failed: {one_line(problem)}"
        else:
            ours = times.median if run.name == "ours" else ours
            rate = setup.moved / times.median / 1e6
            row |= {
                "ms": times.median,
                "ms_p20": times.p20,
                "ms_p80": times.p80,
                "repetitions": times.n,
                "gb_s": rate,
                "copy_percent": 100 * rate / copy,
                "peak_mb": "" if peak is None else peak / 1e6,
                "error": error,
                "tflop_s": setup.flops / times.median / 1e9 if setup.flops else "",
                "ratio": times.median / ours if ours else "",
                "status": "ok",
            }
            if run.goal is not None and machine.is_gpu and row[run.goal.column] != "":
                row["goal_met"] = "met" if run.goal.met(row[run.goal.column]) else "missed"
        machine.clear()
        yield row


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def short_of_memory(row: Row) -> bool:
    return str(row["status"]).startswith(("needs ", "out of memory"))


def run_case(
    case: Case,
    sizes: Sizes,
    dtype: torch.dtype,
    machine: Machine,
    copy: float,
    seconds: float,
    compiling: bool,
    before: Callable[[Row], Row | None] = lambda row: None,
) -> Iterator[Row]:
    """The rows of one case, as `rows_of` makes them; again with a quarter of the rows (once) where something did not
    fit."""
    short = False
    try:
        for row in rows_of(build(case, sizes, dtype, machine, compiling), machine, copy, seconds, before):
            short |= short_of_memory(row)
            yield row
    except (torch.OutOfMemoryError, MemoryError) as problem:  # the inputs alone, or their truth
        yield failure(case, dtype, machine, f"out of memory: {one_line(problem)}")
        short = True
    machine.clear()
    if short and not case.decode and sizes.rows >= 64:
        smaller = replace(sizes, rows=sizes.rows // 4)
        try:
            yield from rows_of(build(case, smaller, dtype, machine, compiling), machine, copy, seconds, before)
        except (torch.OutOfMemoryError, MemoryError) as problem:
            yield failure(case, dtype, machine, f"out of memory with {smaller.rows} rows too: {one_line(problem)}")


def build(case: Case, sizes: Sizes, dtype: torch.dtype, machine: Machine, compiling: bool) -> Setup:
    setup = case.build(sizes, dtype, machine.device)
    setup.runs = [run for run in setup.runs if compiling or not run.compile]
    return setup


def failure(case: Case, dtype: torch.dtype, machine: Machine, reason: str) -> Row:
    return dict.fromkeys(COLUMNS, "") | {
        "kernel": case.kernel,
        "dtype": name_of(dtype),
        "device": machine.name,
        "status": reason,
    }

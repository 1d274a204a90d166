"""Speed, memory and accuracy of every kernel beside the textbook, its torch.compile and Liger-Kernel.

    python -m benchmarks.kernels                        all kernels: a GPU if there is one, else small sizes on a CPU
    python -m benchmarks.kernels --kernel logits_kl --dtype bfloat16
    python -m benchmarks.kernels --quick --out /tmp/results

Each implementation is first run once and checked against the textbook in float64, on the first and last rows; what
fails is reported, not timed.  Peak memory, above the inputs, is that of this first run.  Then: median, 20th and 80th
percentile of repeated calls, on a GPU with a cold L2; the bytes that must move (a formula for each set-up, the same
for all implementations) per second, also as a share of the copy bandwidth measured at the start of the run; the time
relative to ours from the same run.  A CPU's rows say so in their `device`: they tell nothing about a GPU.

Writes kernels-<device>-<date>.csv as the rows come, and a plot of it if matplotlib is installed.  What does not fit
into memory or fails is a row that says why; where memory is short the set-up is repeated with a quarter of the rows.
The exit status is 1 if an implementation of this package is wrong or fails.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks import kernel_setup
from benchmarks.kernel_cases import KERNELS, Case, cases
from benchmarks.kernel_rows import COLUMNS, FITS, Row, failure, run_case
from benchmarks.kernel_setup import Sizes
from benchmarks.measure import Machine
from grade_kernels.backend import interpreting

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class Table:
    """The rows as text, fixed columns, printed as they come."""

    HEAD = (
        f"{'kernel and variant':42} {'dtype':8} {'implementation':14} {'backend':11} {'ms':>9} {'p20':>9} {'p80':>9} "
        f"{'GB/s':>7} {'% copy':>6} {'peak MB':>9} {'x ours':>7} {'error':>7}"
    )

    def __init__(self) -> None:
        self._shape: tuple[object, object] | None = None
        print(self.HEAD)

    def add(self, row: Row) -> None:
        shape = (row["kernel"], row["shape"])
        if shape != self._shape and row["shape"]:
            print(f"-- {row['kernel']} {row['shape']}")
            self._shape = shape
        start = f"{row['kernel']} {row['variant']}"[:42]
        line = f"{start:42} {row['dtype']:8} {row['implementation']:14} {row['backend']:11} "
        if row["status"] != "ok":
            line += str(row["status"])
        else:
            line += (
                " ".join(
                    f"{row[name]:>{width}.{digits}f}" if row[name] != "" else f"{'':{width}}"
                    for name, width, digits in (
                        ("ms", 9, 3),
                        ("ms_p20", 9, 3),
                        ("ms_p80", 9, 3),
                        ("gb_s", 7, 1),
                        ("copy_percent", 6, 1),
                        ("peak_mb", 9, 2),
                        ("ratio", 7, 2),
                    )
                )
                + f" {row['error']:7.0e}"
            )
        if row["goal_met"]:
            line += f"  goal {row['goal']}: {row['goal_met']}"
        print(line, flush=True)


def sizes_for(machine: Machine, quick: bool) -> Sizes:
    """The sizes of this device; fewer rows where a GPU cannot hold six float32 arrays [N, V]."""
    if not machine.is_gpu:
        if interpreting():
            return kernel_setup.INTERPRETER
        return kernel_setup.CPU_QUICK if quick else kernel_setup.CPU
    sizes = kernel_setup.GPU_QUICK if quick else kernel_setup.GPU
    free = machine.free_bytes() or 0
    while sizes.rows > 64 and 6 * 4 * sizes.rows * sizes.vocab > FITS * free:
        sizes = replace(sizes, rows=sizes.rows // 2)
    return sizes


def budget(machine: Machine, quick: bool) -> float:
    """Seconds of repetitions for one implementation."""
    if machine.is_gpu:
        return 0.05 if quick else 0.2
    return 0.1 if quick else 0.4


def result_path(folder: Path, machine: Machine) -> Path:
    """kernels-<device>-<date>.csv, numbered where that exists: nothing measured is overwritten."""
    device = re.sub(r"[^a-z0-9]+", "-", machine.name.lower()).strip("-") if machine.is_gpu else "cpu"
    stem = f"kernels-{device}-{datetime.date.today().isoformat()}"
    path, number = folder / f"{stem}.csv", 2
    while path.exists():
        path, number = folder / f"{stem}-{number}.csv", number + 1
    return path


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = ", ".join(KERNELS)
    parser.add_argument("--kernel", action="append", metavar="NAME", help=f"one of {known}; may be repeated")
    parser.add_argument(
        "--dtype",
        action="append",
        choices=DTYPES,
        help="may be repeated; default: bfloat16 and float32 on a GPU, else float32; scatter_tokens: always float32",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one (also ROCm)")
    parser.add_argument("--quick", action="store_true", help="smaller sizes and fewer repetitions")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", metavar="DIR")
    parser.add_argument(
        "--no-compile", action="store_true", help="leave torch.compile out: it takes longer than everything else"
    )
    parser.add_argument("--time-limit", type=float, metavar="SECONDS", help="start no further set-up after this time")
    options = parser.parse_args(arguments)
    for name in options.kernel or ():
        if name not in KERNELS:
            parser.error(f"argument --kernel: unknown kernel {name!r}; known: {known}")
    if options.time_limit is not None and not options.time_limit > 0:
        parser.error(f"argument --time-limit: must be above 0 seconds, got {options.time_limit:g}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: cuda was asked for, but PyTorch finds no CUDA or ROCm device")
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        probe = options.out / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        parser.error(f"argument --out: cannot write to {options.out}: {error.strerror}")
    return options


def main(arguments: list[str] | None = None) -> int:
    options, began = parse(arguments), time.monotonic()
    machine = Machine(options.device)
    sizes = sizes_for(machine, options.quick)
    dtypes = [DTYPES[name] for name in options.dtype or (("bfloat16", "float32") if machine.is_gpu else ("float32",))]
    chosen = plan([case for case in cases(sizes) if not options.kernel or case.kernel in options.kernel], dtypes)
    seconds = budget(machine, options.quick)
    copy = machine.copy_bandwidth(2**26 if options.quick and not machine.is_gpu else None)
    now = datetime.datetime.now().isoformat(" ", "seconds")
    facts = machine.versions() | {"copy bandwidth": f"{copy:.1f} GB/s", "date": now}
    for name, value in facts.items():
        print(f"{name}: {value}")
    if not machine.is_gpu:
        print("cpu: small sizes; these numbers tell nothing about a GPU")
    path, rows = result_path(options.out, machine), []
    with path.open("w", newline="", encoding="utf-8") as file:
        file.writelines(f"# {name}: {value}\n" for name, value in facts.items())
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        table = Table()
        for row in every_row(chosen, sizes, machine, copy, seconds, options, began):
            rows.append(row)
            writer.writerow({name: f"{v:.6g}" if isinstance(v, float) else v for name, v in row.items()})
            file.flush()
            table.add(row)
    print(f"\n{path}")
    draw(path, rows, machine, copy)
    ours = [str(row["status"]) for row in rows if str(row["implementation"]).startswith("ours")]
    return 1 if any(status.startswith(("wrong", "failed")) for status in ours) else 0


def plan(chosen: list[Case], dtypes: list[torch.dtype]) -> list[tuple[Case, torch.dtype]]:
    """Dtype by dtype; what is measured in one dtype alone comes after the first."""
    groups = [[(case, dtype) for case in chosen if case.only is None] for dtype in dict.fromkeys(dtypes)]
    alone = [(case, case.only) for case in chosen if case.only is not None]
    return [*groups[0], *alone, *(pair for group in groups[1:] for pair in group)]


def every_row(
    chosen: list[tuple[Case, torch.dtype]],
    sizes: Sizes,
    machine: Machine,
    copy: float,
    seconds: float,
    options: argparse.Namespace,
    began: float,
) -> Iterator[Row]:
    """All rows of the chosen (case, dtype) pairs; past the time limit a row that says so."""
    for case, dtype in chosen:
        if options.time_limit is not None and time.monotonic() - began > options.time_limit:
            yield failure(case, dtype, machine, f"skipped: the time limit of {options.time_limit:g} s has passed")
        else:
            yield from run_case(case, sizes, dtype, machine, copy, seconds, not options.no_compile)


def draw(path: Path, rows: list[Row], machine: Machine, copy: float) -> None:
    try:
        from benchmarks.kernel_plot import plot
    except ImportError as error:
        print(f"no plot: {error} (pip install -e '.[report]')")
        return
    picture = plot(path.with_suffix(".png"), rows, machine.name, copy)
    print(picture or "no plot: nothing was measured")


if __name__ == "__main__":
    sys.exit(main())

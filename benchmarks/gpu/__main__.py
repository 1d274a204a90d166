"""What needs a GPU, in one call of less than eight minutes: tests, then kernels, then a training step.

    bash benchmarks/gpu.sh                      results in benchmarks/results/gpu, or in the folder $OUT
    bash benchmarks/gpu.sh --earlier DIR        first takes over what an earlier call has left in DIR
    bash benchmarks/gpu.sh --dry-run            the same on a CPU with toys, to try the command itself
    bash benchmarks/gpu.sh --summary            prints the summary of what is there, and measures nothing

It needs torch, triton, transformers, peft and pytest, and no network: weights are random, in the shape of Qwen3-4B.
Every part has a share of the time that is left when it begins, in the order of their worth:

    tests       tests/test_gpu.py, then tests of every kernel against float64, in as many processes as there are cores
    ahead       compiles what the next parts run, in as many processes
    kernels     bfloat16: ours beside the textbook, at Qwen3's vocabulary
    training    a step of 16 x 64 tokens, eager, with decoding compiled, and layers too, then longer responses
    more        the kernels beside torch.compile, and in float32

A row is on disk as soon as it is measured. A call that is cut, or whose time is over, is called again for the rest:
what is there from the same device, versions and code is kept, what failed is measured again. A test or a kernel that
hangs or ends its process is a row that says so, and the others go on.

Exit status: 0, or the sum of 1 (a test failed), 2 (a measurement failed, or a result is wrong), 8 (something is left
to be measured) and 16 (a part could not be run, or nothing written); 4: there is no GPU, nothing was run.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu import machine, pool, selection, training
from benchmarks.gpu.pool import Crew
from benchmarks.gpu.rows import Rows
from benchmarks.gpu.summary import FILES, NOT_RUN, summary
from benchmarks.gpu.work import Order
from grade.errors import GradeError, reason_of, writing
from grade.files import locked, replace_bytes, replace_text
from grade.machine import cache_folder

SECONDS = 460.0
"""Of a call, which leaves some of eight minutes to what starts it."""
COMPILES, MEASURES = 120.0, 45.0
"""Seconds after which one test, row or step counts as hanging, where torch.compile may take most of them, and where
Triton alone compiles."""
LOG = "log.txt"
WARM = "compilation ahead"
_LEAST = 15.0  # seconds under which no part is begun
_PER_WORKER = 2.5  # GiB of the device's memory
CODE = {
    "tests": ("grade_kernels", "grade", "tests"),
    "kernels": ("grade_kernels", "benchmarks", "grade/machine.py", "grade/memory/peak.py"),
    "training": ("grade_kernels", "grade", "benchmarks"),
}
"""What the rows of a file depend on."""


@dataclass(frozen=True)
class Part:
    """One of the parts.

    Args:
        file: a key of `FILES`; "" for rows that are kept nowhere.
        share: of the time that is left when it begins.
        keys: what it measures, where that is known beforehand.
        patience: as `Crew` takes it.
    """

    name: str
    file: str
    command: list[str]
    share: float
    workers: int = 1
    keys: tuple[str, ...] = ()
    patience: float = COMPILES


def parts(dry: bool, everything: bool, workers: int) -> list[Part]:
    """All parts, in the order of their worth."""

    def kernels(*passes: str, warm: bool = False) -> list[str]:
        options = [*(["--dry"] if dry else []), *(["--warm"] if warm else [])]
        return [sys.executable, "-m", "benchmarks.gpu.kernels", *options, *passes]

    first, rest = ("bfloat16",), ("float32",) if dry else ("bfloat16+compile", "float32", "float32+compile")
    steps = [
        Part(
            f"training: {entry.name}",
            "training",
            training.command(dry, i),
            entry.share,
            keys=(*entry.keys, training.RATES),
            patience=2 * COMPILES if entry.algorithm == "layers" else COMPILES,  # two things to compile
        )
        for i, entry in enumerate(training.entries(dry))
    ]
    return [
        Part("all tests" if everything else "tests", "tests", selection.command(dry, everything), 0.35, workers),
        Part(WARM, "", kernels(*first, "float32", warm=True), 0.2, workers),
        Part("kernels", "kernels", kernels(*first), 0.45, patience=MEASURES),
        *steps,
        Part("more kernels", "kernels", kernels(*rest), 1.0),
    ]


class Call:
    """One call: its parts one after another, and the summary."""

    def __init__(self, out: Path, dry: bool, seconds: float, facts: dict[str, str]):
        self.out, self.dry, self.until, self.stopped = out, dry, time.time() + seconds, False
        same = {**facts, **machine.versions()}
        self.rows = {}
        for name, file in FILES.items():
            self.rows[name] = Rows(out / file, machine.fingerprint(same, CODE[name]))
            self.rows[name].begin({**same, "commit": machine.commit(), "code": machine.code(CODE[name])})

    def stop(self, *_: object) -> None:
        """End now: no exception, which could arrive where nothing ends the workers."""
        self.stopped = True

    def is_complete(self, part: Part) -> bool:
        """Whether all its rows are there."""
        rows = self.rows[part.file]
        if part.keys:
            rows.add_plan(part.name, list(part.keys))
        return rows.missing(part.name) == []

    def compiled(self) -> Path:
        """Beside compiled kernels, the mark that the next parts find theirs there."""
        cache = Path(os.environ["TRITON_CACHE_DIR"])
        cache.mkdir(parents=True, exist_ok=True)
        return cache / f"ahead-{self.rows['training'].of}"

    def run(self, part: Part) -> None:
        """Run a part in its share of the time that is left."""
        left = self.until - time.time()
        if self.stopped or left < (0 if self.dry else _LEAST):
            print(f"== {part.name}: {'stopped' if self.stopped else 'no time is left'}", flush=True)
            return
        until = time.time() + part.share * left
        print(f"== {part.name}: {part.share * left:.0f} s of {left:.0f} s", flush=True)
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            rows = self.rows[part.file] if part.file else Rows(Path(folder) / "rows.jsonl", "")
            order = Order(part.name, str(rows.path), rows.of, folder, until, self.dry)
            environment = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"} if part.workers > 1 else {}
            crew = Crew(part.command, part.workers, 600.0 if self.dry else part.patience, environment)
            problems = pool.run(crew, order, self.out / LOG, lambda: self.stopped)
            if part.name == WARM and time.time() < until and not problems and not self.stopped:
                self.compiled().touch()
        seconds = time.monotonic() - began
        if part.file:
            self.rows[part.file] = rows = Rows(rows.path, rows.of)
            rows.end(part.name, seconds, problems)
        print(f"   {seconds:.0f} s", *problems, sep="\n   ", flush=True)


def main() -> int:
    options, began = parse(), time.monotonic()
    facts = None if options.summary else prepare(options.dry_run)
    try:
        with writing(options.out, "--out (or $OUT)"):
            options.out.mkdir(parents=True, exist_ok=True)
        with locked(options.out / LOG, "--out", f"Another call is writing to {options.out}: wait for it."):
            if facts is not None:
                call(options, facts, options.seconds - (time.monotonic() - began))
            text, status = write_summary(options.out)
    except (GradeError, OSError) as error:
        print(error, file=sys.stderr)
        return NOT_RUN
    print(f"\n{text}\nResults: {options.out}; exit status {status}.", flush=True)
    return status


def call(options: argparse.Namespace, facts: dict[str, str], seconds: float) -> None:
    """Measure what is missing."""
    if options.earlier is not None:
        take_over(options.earlier, options.out)
    here = Call(options.out, options.dry_run, seconds, facts)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, here.stop)
    todo = parts(options.dry_run, options.all_tests, 1 if options.dry_run else workers(facts))
    missing = [part for part in todo if part.file and not here.is_complete(part)]
    ahead = not here.compiled().exists() and any(part.file != "tests" for part in missing)
    for part in todo:
        if part in missing or part.name == WARM and ahead:
            here.run(part)
            write_summary(options.out)


def take_over(earlier: Path, out: Path) -> None:
    """Copy what an earlier call has left, where `out` has nothing of its own.

    Raises:
        GradeError: it has left nothing.
        OSError: a file cannot be copied.
    """
    found = [name for name in FILES.values() if (earlier / name).is_file()]
    if not found:
        raise GradeError(f"--earlier: {earlier} has none of {', '.join(FILES.values())}. Name an earlier call's --out.")
    for name in found:
        if not (out / name).exists():
            replace_bytes(out / name, (earlier / name).read_bytes())
        elif not (out / name).samefile(earlier / name):
            print(f"--earlier: {out / name} is there already and goes on; {earlier / name} is not read", flush=True)


def write_summary(out: Path) -> tuple[str, int]:
    """As `summary` makes it.

    Raises:
        GradeError: rows are damaged.
    """
    try:
        text, status = summary(out)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise GradeError(
            f"{out}: a row of {', '.join(FILES.values())} is damaged, or of another version ({reason_of(error)}). Name "
            "another folder with --out."
        ) from error
    replace_text(out / "summary.md", text)
    return text, status


def prepare(dry: bool) -> dict[str, str]:
    """What all workers share in their environment; the device.

    Raises:
        SystemExit: there is no GPU.
    """
    os.environ.setdefault("TRITON_CACHE_DIR", str(cache_folder() / "triton"))
    os.environ["PYTHONUNBUFFERED"] = "1"
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # what a machine happens to have
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.pop("TRITON_INTERPRET", None)
    if not dry:
        return gpu()
    no_gpu = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    os.environ |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", **no_gpu}
    return {"device": "dry run"}


def gpu() -> dict[str, str]:
    """The device, as a process of its own sees it: this one holds none of its memory.

    Raises:
        SystemExit: there is none.
    """
    command = [sys.executable, "-m", "benchmarks.gpu.machine"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=COMPILES)
    except subprocess.SubprocessError as error:
        print(getattr(error, "stderr", None) or error, file=sys.stderr)
        print("no usable GPU, nothing was run (--dry-run tries the command itself)")
        sys.exit(machine.NO_GPU)
    return json.loads(done.stdout)


def workers(facts: dict[str, str]) -> int:
    """Processes that compile at a time: one a core, as far as each has memory on the device."""
    memory = float(facts["GPU memory"].split()[0])
    return max(1, min(len(os.sched_getaffinity(0)), int(memory / _PER_WORKER), 16))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks/gpu.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    environment = os.environ.get
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: $OUT, or benchmarks/results/gpu")
    parser.add_argument("--earlier", type=Path, metavar="DIR", help="an earlier call's results, not changed")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of the whole call (default: %(default)g)")
    parser.add_argument("--all-tests", action="store_true", help="all tests of the kernels that a GPU runs")
    parser.add_argument("--dry-run", action="store_true", default=environment("DRY_RUN", "0") not in ("", "0"))
    parser.add_argument("--summary", action="store_true", help="print what is there, and measure nothing")
    options = parser.parse_args()
    default = machine.ROOT / ("runs/gpu-dry-run" if options.dry_run else "benchmarks/results/gpu")
    options.out = (options.out or Path(environment("OUT") or default)).resolve()
    if options.earlier is not None and not options.earlier.is_dir():
        parser.error(f"argument --earlier: there is no folder {options.earlier}")
    if not options.seconds > 0:
        parser.error(f"argument --seconds: must be above 0, got {options.seconds:g}")
    return options


if __name__ == "__main__":
    sys.exit(main())

"""What the kernels that stream logits take for an entry by their machine code, and the ceilings this sets. No GPU.

    python -m benchmarks.kernel_counts --save benchmarks/results/kernel_counts.json     # a minute of one core
    python -m benchmarks.kernel_counts --table benchmarks/results/kernel_counts.json    # the tables of a saved file
    python -m benchmarks.kernel_counts --table benchmarks/results/kernel_counts.json --only versions

With --save, what the file holds of other versions of Triton is kept. Another version is measured when it stands in
front:

    pip install --target triton-3.6.0 --no-deps triton==3.6.0
    PYTHONPATH=triton-3.6.0:. python -m benchmarks.kernel_counts --save benchmarks/results/kernel_counts.json
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.saved import command, new_parser, number, read_saved
from grade.tables import Column, Table, numbers
from grade_kernels.aot import binary
from grade_kernels.aot.command import configuration
from grade_kernels.aot.devices import DEVICES
from grade_kernels.aot.table import record
from grade_kernels.common.environment import check_triton, interpreting
from grade_kernels.common.stats import KLStats, TokenStats
from grade_kernels.triton_ops import kl, launch, logprob, objective, sample, sweep

VOCAB, K = 151936, 256  # Qwen's
MANY, FEW = 8, 2  # rows, of a device that pretends to have four processors
PARTS = ("ceilings", "versions")


def cases() -> Iterator[tuple[str, launch.Launch]]:
    """Every kernel that streams logits, in the dtype that a run gives it: a name, and what would be launched."""

    def rows(dtype: torch.dtype = torch.bfloat16, n: int = MANY) -> Tensor:
        return torch.empty(n, VOCAB, dtype=dtype)

    p, q, narrow, wide = rows(), rows(), rows(n=FEW), torch.float32
    ids, support, weights = (
        torch.zeros(MANY, dtype=torch.int64),
        torch.zeros(MANY, K, dtype=torch.int64),
        torch.ones(MANY),
    )
    kl_stats, stats = KLStats.empty(MANY, wide, p.device), TokenStats.empty(MANY, wide, p.device)
    x, y = rows(wide), rows(wide)
    calls = {
        "KL of two rows": lambda: kl.kl_stats(p, q, wide),
        "its two gradients": lambda: kl.kl_grads(p, q, kl_stats, weights, rows(), rows()),
        "log-probability, entropy": lambda: logprob.token_stats(p, ids, wide),
        "their gradient": lambda: logprob.token_stats_grad(p, ids, stats, weights, weights, rows()),
        "top-k and token, many rows": lambda: sample.select_and_sample(p, K, 1.0, ids, 0, 0, None, None, None, wide),
        "its first read, few rows": lambda: sample.select(narrow, K, None, None, None, wide),
        "head of a replay, fp32": lambda: sweep.head_chunk(x, y, K, None, support, ids, "policy_ref", False, None),
        "with KL's gradients, fp32": lambda: sweep.head_chunk(x, y, K, None, support, ids, "policy_ref", True, None),
        "objective, fp32": lambda: objective.objective_chunk(x, y, None, support, ids, (weights,) * 3, True, None),
    }
    for name, call in calls.items():
        with launch.recording() as launches:
            call()
        yield name, launches[0]  # the launch that reads the rows comes first


def measure(options: argparse.Namespace) -> dict:
    """The rows of this Triton, and those of other versions in the file to be saved."""
    if interpreting():
        sys.exit("TRITON_INTERPRET is set, which replaces the compiler by an interpreter. Unset it.")
    check_triton()
    import triton

    def kept() -> list[dict]:
        if options.save is None or not options.save.exists():
            return []
        saved = read_saved(options.save, "the file to add to, or a new one", "rows", of_rows=("triton",))
        return [row for row in saved["rows"] if row["triton"] != triton.__version__]

    kept()  # a file that cannot be added to is refused before anything is compiled
    named = {configuration(made, target).key: name for name, made in cases() for target in binary.TARGETS}
    every = [configuration(made, target) for _, made in cases() for target in binary.TARGETS]
    rows = []
    for row in binary.compile_all(every, options.jobs):
        if row.error:
            sys.exit(f"{row.configuration.name} for {row.configuration.target}: {row.error}")
        rows.append({"name": named[row.configuration.key], **record(row, triton.__version__)})
    rows.sort(key=lambda row: (list(named.values()).index(row["name"]), list(binary.TARGETS).index(row["target"])))
    return {"vocab": VOCAB, "k": K, "rows": kept() + rows}


def document(saved: dict, parts: tuple[str, ...]) -> str:
    versions = sorted({row["triton"] for row in saved["rows"]}, key=lambda text: [int(n) for n in text.split(".")])
    tables = {
        "ceilings": lambda: _ceilings(saved["rows"], versions[-1]),
        "versions": lambda: _versions(saved["rows"], versions),
    }
    return "\n".join(tables[part]().markdown() + "\n" for part in parts)


def _ceilings(rows: list[dict], version: str) -> Table:
    """A line a kernel; counts of several targets are in their order."""
    lines = []
    for name, of_target in _by_name(rows, version).items():
        each = [of_target[target] for target in binary.TARGETS]
        lines.append(
            [
                name,
                f"{each[0]['load_bytes_per_element'] + each[0]['store_bytes_per_element']:.3g}",
                " / ".join(str(row["registers"]) for row in each),
                " / ".join(f"{row['issue_per_element']:.1f}" for row in each),
                *(f"{of_target[device.target][f'ceiling_{product}']:.0%}" for product, device in DEVICES.items()),
            ]
        )
    titles = ("bytes", "registers", "instructions", *DEVICES)
    return Table("", [Column(f"Triton {version}"), *numbers(titles)], lines)


def _versions(rows: list[dict], versions: list[str]) -> Table:
    """What threads exchange in all loops of the worst target, and instructions for an entry on sm_90, by version."""
    lines: dict[str, list[str]] = {}
    for version in versions:
        for name, of_target in _by_name(rows, version).items():
            shuffles, barriers = (max(row[kind] for row in of_target.values()) for kind in ("shuffles", "barriers"))
            count = of_target["sm_90"]["issue_per_element"]
            lines.setdefault(name, []).append(f"{shuffles} / {barriers} / {count:.1f}")
    return Table(
        "", [Column("shuffles / barriers / instructions"), *numbers(versions)], [[n, *c] for n, c in lines.items()]
    )


def _by_name(rows: list[dict], version: str) -> dict[str, dict[str, dict]]:
    found: dict[str, dict[str, dict]] = {}
    for row in rows:
        if row["triton"] == version:
            found.setdefault(row["name"], {})[row["target"]] = row
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--jobs", type=number(int, 1), default=os.cpu_count() or 1, help="processes (default: cores)")
    parser.add_argument("--only", choices=PARTS, help="one of the tables")
    known, _ = parser.parse_known_args([word for word in arguments or sys.argv[1:] if word not in ("-h", "--help")])
    parts = PARTS if known.only is None else (known.only,)
    command(parser, arguments, measure, lambda saved: document(saved, parts), "rows", of_rows=("name", "triton"))


if __name__ == "__main__":
    main()

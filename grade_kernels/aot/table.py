"""What the command prints and writes: a line or a CSV row of every compilation, and the summary below."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from typing import Any, TextIO

from grade_kernels.aot.binary import TARGETS, Configuration, Resources, Row
from grade_kernels.aot.devices import DEVICES, ceiling, devices_of, resident_warps

HEADER = (
    f"{'target':7} {'kernel':28} {'regs':>4} {'spills':>6} {'shared':>6} {'warps':>5} {'of':>2} {'instr/el':>8} "
    f"{'bytes/el':>8} {'seconds':>7}  {'ceiling':19}  arguments"
)
# Over the table, since its words are short.
LEGEND = """\
warps, of: of a block, and how many of a processor's its registers and shared memory leave room for.
instr/el, bytes/el: instructions of a thread (vector instructions on AMD's devices, a slow one as four) and bytes loaded
and stored for one entry of the row, or of the pair of rows, in the loops that stream logits.
ceiling: what these counts allow of the memory's speed, in per cent: a bound, not a measurement; above 100 the memory is
the limit. Where nothing is said the kernel streams no logits.
"""


def line(row: Row) -> str:
    """The row as printed, and below it what is wrong with it."""
    one, found = row.configuration, row.resources
    numbers = f"{found.registers:4} {found.spills:6} {found.shared:6}" if found else f"{'-':>4} {'-':>6} {'-':>6}"
    text = (
        f"{one.target:7} {one.name:28} {numbers} {one.num_warps:5} {_resident(one, found):>2} {_speed(row)} "
        f"{row.seconds:7.2f}  {_ceilings(row):19}  {one}"
    )
    return "\n    ".join((text, *problems(row)))


def problems(row: Row) -> list[str]:
    """What fails the command, in words."""
    found = row.resources
    words = [f"FAILED {row.error}"] if row.error else ["SPILLS"] if found and found.spills else []
    return words + [f"EXCHANGES {words}" for words in (row.streamed.exchanges if row.streamed else ())]


def _speed(row: Row) -> str:
    streamed = row.streamed
    if streamed is None or not streamed.has_speed:
        return f"{'':8} {'':8}"
    return f"{streamed.per_entry('issue'):8.2f} {streamed.bytes_per_entry:8.2f}"


def _ceilings(row: Row) -> str:
    if row.streamed is None or not row.streamed.has_speed:
        return ""
    return " ".join(f"{name} {ceiling(row.streamed, name):.0%}" for name in devices_of(row.configuration.target))


def _resident(one: Configuration, found: Resources | None) -> str | int:
    if found is None:
        return "-"
    return resident_warps(one.target, found.registers, found.shared, one.num_warps, TARGETS[one.target].warp_size)


def print_summary(rows: Sequence[Row], triton: str, out: TextIO) -> bool:
    """What is wrong with any row; whether nothing is."""
    failed = [row for row in rows if row.error]
    spilled = [row for row in rows if row.resources and row.resources.spills]
    exchanging = [row for row in rows if row.streamed and row.streamed.exchanges]
    print(
        f"\n{len(rows) - len(failed)} of {len(rows)} compiled, {len(spilled)} with spills, "
        f"{len(exchanging)} with shuffles or barriers where they stream (Triton {triton})",
        file=out,
    )
    measured = [(row.resources.registers, row.configuration) for row in rows if row.resources]
    if measured:
        most, most_of = max(measured, key=lambda pair: pair[0])
        slowest = max(rows, key=lambda row: row.seconds)
        print(
            f"most registers: {most} ({most_of.name}, {most_of.target}); "
            f"slowest: {slowest.seconds:.1f} s ({slowest.configuration.name}, {slowest.configuration.target})",
            file=out,
        )
    for title, bad in (("did not compile", failed), ("spills", spilled)):
        for row in bad:
            print(f"{title}: {row.configuration.target} {row.configuration.name} {row.configuration}", file=out)
    for row in exchanging:
        one = row.configuration
        for words in row.streamed.exchanges if row.streamed else ():
            print(f"exchanges: {one.target} {one.name}, Triton {triton}: {words}; {one}", file=out)
    return not (failed or spilled or exchanging)


_COUNTS = ("instructions", "issue", "special", "load_bytes", "store_bytes")
_FIELDS = (
    *"target kernel registers spills shared_bytes warps resident_warps".split(),
    *(f"{name}_per_element" for name in _COUNTS),
    *"shuffles barriers".split(),
    *(f"ceiling_{name}" for name in DEVICES),
    *"seconds triton arguments error".split(),
)


def record(row: Row, triton: str) -> dict[str, Any]:
    """The row by the names of the CSV file; fields that do not apply are left out.

    Counts are of a thread for one entry of the row, ceilings shares of the devices' memory speed, and `shuffles` and
    `barriers` those of a turn of every loop that streams logits, together.
    """
    one, found, streamed = row.configuration, row.resources, row.streamed
    cells: dict[str, Any] = {"target": one.target, "kernel": one.name, "warps": one.num_warps, "triton": triton}
    cells |= {"seconds": round(row.seconds, 3), "arguments": str(one), "error": row.error}
    if found:
        cells |= {"registers": found.registers, "spills": found.spills, "shared_bytes": found.shared}
        cells |= {"resident_warps": _resident(one, found)}
    if streamed:
        loops = [stream.counts for stream in streamed.found]
        cells |= {"shuffles": sum(x.shuffles for x in loops), "barriers": sum(x.barriers for x in loops)}
    if streamed and streamed.has_speed:
        cells |= {f"{name}_per_element": round(streamed.per_entry(name), 3) for name in _COUNTS}
        cells |= {f"ceiling_{name}": round(ceiling(streamed, name), 4) for name in devices_of(one.target)}
    return cells


class Table:
    """The CSV file, to which rows are written as they come; no file without a path."""

    def __init__(self, path: str | None, triton: str):
        self._file, self._triton = None if path is None else open(path, "w", newline=""), triton

    def __enter__(self) -> Table:
        if self._file is not None:
            self._writer = csv.DictWriter(self._file, _FIELDS)
            self._writer.writeheader()
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, row: Row) -> None:
        if self._file is not None:
            self._writer.writerow(record(row, self._triton))
            self._file.flush()

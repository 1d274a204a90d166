"""Which loops of which kernels stream logits, and what they take of a thread for every entry.

That is declared here and not guessed: a stream is the innermost loop in which a function's code loads from memory,
found by the source lines of the loads. Its entries are the bytes that a turn loads over the bytes of one entry of the
pointers that it is declared to read, in the types of the configuration, and must be a whole number of the tiles that
the launcher asked for. A stream without a loop, or with a loop inside it, is refused: nothing about it would be known.
"""

from __future__ import annotations

import ast
import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Protocol

from grade_kernels.aot.listing import Frame
from grade_kernels.aot.loops import Access, Counts, Loop


@dataclass(frozen=True)
class Stream:
    """A loop over a row of logits.

    Attributes:
        function: whose loop it is, with the loads in it or in what it calls; file and name.
        reads: the kernel's parameters of which a turn reads one entry for every entry of the tile.
        given, absent: parameters without or with which the kernel has no such loop.
        share: of the launcher's tile, one part in so many.
        words: parameters of 4-byte words, one of which a turn reads for every WIDTH adjacent entries.
        instead: functions that the same loop is in where the types of the logits are others.
    """

    function: str
    reads: tuple[str, ...]
    given: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    share: int = 1
    words: tuple[str, ...] = ()
    instead: tuple[str, ...] = ()

    @property
    def functions(self) -> set[str]:
        return {self.function, *self.instead}


_SIDES = ("policy", "ref")
STREAMS: dict[str, tuple[Stream, ...]] = {
    "kl._stats_kernel": (Stream("online.kl_row", ("p", "q"), instead=("half.kl_row",)),),
    "kl._grads_kernel": (Stream("online.write_kl_grads", ("p", "q")),),
    "logprob._stats_kernel": (Stream("online.lse_row", ("x",)),),
    "logprob._grad_kernel": (Stream("logprob._grad_kernel", ("x",)),),
    "sweep._head_kernel": (
        Stream("online.kl_row", _SIDES),
        Stream("online.lse_row", ("policy",), absent=("ref",)),
        Stream("online.write_kl_grads", _SIDES, given=("GRAD",)),
    ),
    "objective._objective_kernel": (
        Stream("online.kl_row", _SIDES),
        Stream("online.lse_row", ("policy",), absent=("ref",)),
        Stream("objective.ref_kl_and_grad", _SIDES, share=2),
        Stream("objective.ref_kl_and_grad", ("policy",), given=("entropy_weights",), absent=("ref",), share=2),
    ),
    # Which ids are suppressed is asked for the maxima alone.
    "sample.select_kernel": (
        Stream("topk.survey", ("logits",), absent=("parts", "given"), words=("bits",)),
        Stream("topk.survey", ("logits",), absent=("parts",), given=("given",)),
    ),
    "sample.survey_kernel": (
        Stream("topk.survey", ("logits",), given=("maxima",), words=("bits",)),
        Stream("topk.survey", ("logits",), absent=("maxima",)),
    ),
}
# Loops over a row that few rows enter: they must not exchange anything either, but say nothing of the speed. So are the
# loops of functions that stream in other kernels, or in other configurations.
RARE = ("online.careful", "bisection._count_in_row")
# Lines by which NVIDIA's assembler may move a load down: it takes the lines of Triton's inline assembly, a register
# each, for lines of the source.
_MOVED = 16


class Configured(Protocol):
    """What of `binary.Configuration` is needed here."""

    @property
    def module(self) -> str: ...

    @property
    def signature(self) -> dict[str, str]: ...

    @property
    def name(self) -> str: ...

    def given(self, parameter: str) -> bool: ...

    def constant(self, parameter: str) -> int: ...


@dataclass(frozen=True)
class Found:
    """A stream's loop: its function, entries of a turn (0 where `rare`), and what a turn takes of a thread."""

    function: str
    entries: int
    rare: bool
    counts: Counts

    @property
    def exchanges(self) -> str:
        """What threads exchange in a turn, in words; empty if nothing."""
        counts = self.counts
        if not counts.shuffles and not counts.barriers:
            return ""
        return f"{counts.shuffles} shuffles and {counts.barriers} barriers in a turn of the loop of {self.function}"


@dataclass(frozen=True)
class Streamed:
    """The streams of a compiled kernel."""

    found: tuple[Found, ...]

    def per_entry(self, what: str) -> float:
        """A number of `Counts`, summed over the loops that every row enters, for one entry of the row (or of the pair
        of rows, where a loop reads two)."""
        return sum(getattr(one.counts, what) / one.entries for one in self.found if not one.rare)

    @property
    def has_speed(self) -> bool:
        """Whether there is a loop that every row enters; without one, `per_entry` says nothing."""
        return any(not one.rare for one in self.found)

    @property
    def bytes_per_entry(self) -> float:
        """Loaded and stored, by instructions; what is read twice counts twice, also where a cache has it."""
        return self.per_entry("load_bytes") + self.per_entry("store_bytes")

    @property
    def exchanges(self) -> list[str]:
        """Of every loop that has any, in words."""
        return list(dict.fromkeys(one.exchanges for one in self.found if one.exchanges))


def find_streams(configuration: Configured, loops: Sequence[Loop]) -> Streamed:
    """The declared streams of a kernel that is in `STREAMS` among its loops.

    Raises:
        RuntimeError: one has no loop, a loop inside it, or loads that are no whole number of tiles.
    """
    names = _Names(configuration.module)
    wanted = [
        stream
        for stream in STREAMS[configuration.name]
        if all(map(configuration.given, (*stream.reads, *stream.given)))
        and not any(map(configuration.given, stream.absent))
    ]
    found = []
    for loop in loops:
        loads = loop.counts.loads
        owner = names.owner(loop, loads)
        stream = next((stream for stream in wanted if owner in stream.functions), None)
        if owner is not None and stream is not None:
            found.append(_found(configuration, owner, stream, loop, sum(access.bytes for access in loads)))
        elif owner is not None:
            found.append(Found(owner, 0, True, loop.counts))
    for stream in wanted:
        if all(one.function not in stream.functions or one.rare for one in found):
            raise RuntimeError(
                f"{configuration.name} has no loop of {stream.function} that loads: grade_kernels/aot/streams.py "
                "declares what is not so, or TRITON_DISABLE_LINE_INFO=1 has removed the source lines"
            )
    return Streamed(tuple(_once(found)))


def _found(configuration: Configured, owner: str, stream: Stream, loop: Loop, size: int) -> Found:
    where = f"the loop of {owner} in {configuration.name}"
    if not loop.is_innermost:
        raise RuntimeError(f"{where} has {loop.inside} loops inside it, so its turns are not all alike")
    if loop.counts.calls:
        raise RuntimeError(f"{where} calls a subroutine, whose instructions are not counted")
    entry = sum(_SIZES[configuration.signature[name].lstrip("*")] for name in stream.reads)
    width = configuration.constant("WIDTH")
    tile = width * configuration.constant("STEPS") // stream.share
    size_of_tile = entry * tile + 4 * (tile // width) * sum(map(configuration.given, stream.words))
    if size % size_of_tile:
        raise RuntimeError(
            f"{where} loads {size} bytes a thread, which is no whole number of tiles of {tile} x {entry}"
        )
    return Found(owner, size // size_of_tile * tile, False, loop.counts)


_SIZES = {"fp32": 4, "bf16": 2, "fp16": 2}


def _once(found: list[Found]) -> list[Found]:
    """Where the compiler made several loops of one that every row enters: the one with most entries a turn, which a
    long row spends its time in, unless another exchanges something."""
    best: dict[object, Found] = {}
    for number, one in enumerate(found):
        key = number if one.rare else one.function
        rank = (bool(one.exchanges), one.entries)
        if key not in best or rank > (bool(best[key].exchanges), best[key].entries):
            best[key] = one
    return list(best.values())


class _Names:
    """The functions around instructions, from their source lines, in the folder of the kernel's module."""

    def __init__(self, module: str):
        self._folder = Path(importlib.import_module(module).__file__ or "").parent
        self._declared = set(RARE).union(*(stream.functions for streams in STREAMS.values() for stream in streams))

    def of(self, frames: Sequence[Frame]) -> tuple[str, ...]:
        """As `online.kl_row`, the innermost first; other folders' functions are left out."""
        paths = [(self._folder / file, line) for file, line in frames]
        return tuple(f"{path.stem}.{_function(path, line)}" for path, line in paths if path.is_file())

    def of_load(self, access: Access) -> tuple[str, ...]:
        (file, line), *outer = access.frames or (("", 0),)
        path = self._folder / file
        return self.of([(file, _load_at(path, line) if path.is_file() else line), *outer])

    def owner(self, loop: Loop, loads: Sequence[Access]) -> str | None:
        """The declared function whose loop it is; None where it does not load for one.

        Raises:
            RuntimeError: it could be several.
        """
        if not loads:
            return None
        chains = map(self.of_load, loads)
        owners: set[str | None] = {next((n for n in chain if n in self._declared), None) for chain in chains}
        if owners == {None} and all(len(access.frames) > 1 for access in loads):
            return None  # whatever else the compiler has moved into it
        if None in owners:
            # Of what is inlined Triton 3.6 names the innermost line alone for NVIDIA. The loop's own instructions, its
            # addresses and sums, then say whose it is.
            owners = {name for frames in loop.frames for name in self.of(frames[:1]) if name in self._declared}
        if len(owners) > 1:
            raise RuntimeError(f"a loop that loads belongs to {' or '.join(sorted(map(str, owners)))}")
        return next(iter(owners), None)


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def _load_at(path: Path, line: int) -> int:
    """The line of the load that NVIDIA's assembler has at `line`: the last one above, if it is near."""
    nodes = (node for node in ast.walk(_tree(path)) if isinstance(node, ast.Call))
    lines = [node.lineno for node in nodes if isinstance(node.func, ast.Attribute) and node.func.attr == "load"]
    return max((at for at in lines if line - _MOVED <= at <= line), default=line)


@cache
def _function(path: Path, line: int) -> str:
    functions = (node for node in ast.walk(_tree(path)) if isinstance(node, ast.FunctionDef))
    return next((f.name for f in functions if f.lineno <= line <= (f.end_lineno or f.lineno)), "")

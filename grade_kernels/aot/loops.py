"""The loops of a kernel, and what one turn of each takes of a thread, counted in its machine code.

A loop is a set of blocks each of which can be reached from each other one; what is left of it without the jumps back
to where it is entered has the loops inside it. So forward branches in a loop and code that the compiler has put
elsewhere are seen as what they are. Every instruction of a loop counts once, on whichever path it lies: where a turn
takes one of two paths, the counts are of both.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from grade_kernels.aot.listing import Block, Frame, Instruction


@dataclass(frozen=True)
class Access:
    """A load from or a store to global memory: bytes a thread, and where it comes from (`Instruction.frames`)."""

    bytes: int
    frames: tuple[Frame, ...]


@dataclass
class Counts:
    """What instructions take of one thread.

    Attributes:
        instructions: all of them.
        issue: turns of a scheduler. An instruction takes one; on AMD's devices only vector instructions count, which
            other kinds are issued beside, and those that run at a quarter of the rate take four.
        scalar: of AMD's scalar unit.
        floats: float32 additions and multiplications, fused or not, two for a packed pair. NVIDIA only.
        special: of the special-function unit (exponentials, logarithms, reciprocals, square roots). On AMD's devices
            these are vector instructions of a quarter of the rate.
        loads, stores: of global memory, atomic operations among the stores.
        shuffles: exchanges between the lanes of a warp.
        barriers: of the block, and fences.
        shared: accesses of shared memory.
        calls: of subroutines, whose instructions are not counted.
    """

    instructions: int = 0
    issue: int = 0
    scalar: int = 0
    floats: int = 0
    special: int = 0
    shuffles: int = 0
    barriers: int = 0
    shared: int = 0
    calls: int = 0
    loads: list[Access] = field(default_factory=list)
    stores: list[Access] = field(default_factory=list)

    @property
    def load_bytes(self) -> int:
        return sum(access.bytes for access in self.loads)

    @property
    def store_bytes(self) -> int:
        return sum(access.bytes for access in self.stores)


@dataclass
class Loop:
    """A loop, but for `inside` without the loops inside it.

    Attributes:
        label: where it begins.
        counts: what a turn takes.
        inside: how many loops it has inside.
        frames: source lines of all its instructions.
    """

    label: str
    counts: Counts
    inside: int
    frames: frozenset[tuple[Frame, ...]]

    @property
    def is_innermost(self) -> bool:
        return self.inside == 0


def loops(blocks: Sequence[Block], count: Callable[[Counts, Instruction], None]) -> list[Loop]:
    """Every loop that the first block reaches, an inner one before that around it.

    Args:
        count: `count_sass` or `count_amdgcn`.

    Raises:
        RuntimeError: a loop can be entered at two places, so that what is inside it is not defined.
    """
    reached = _reachable({number: block.successors for number, block in enumerate(blocks)}, 0)
    graph = {number: blocks[number].successors & reached for number in sorted(reached)}
    found: list[Loop] = []
    _find(blocks, graph, {0}, count, found)
    return found


def _find(
    blocks: Sequence[Block],
    graph: dict[int, set[int]],
    entries: set[int],
    count: Callable[[Counts, Instruction], None],
    found: list[Loop],
) -> int:
    """Append the loops of a part of the graph that is entered at `entries`; how many are outermost in it."""
    outermost = 0
    for members in _cycles(graph):
        heads = {n for n in members if n in entries or any(n in graph[m] for m in graph if m not in members)}
        if len(heads) != 1:
            names = ", ".join(blocks[number].label for number in sorted(heads))
            raise RuntimeError(f"a loop is entered at {len(heads)} places ({names}), so its turns cannot be counted")
        (head,) = heads
        inside = {number: (graph[number] & members) - {head} for number in members}
        before = len(found)
        depth = _find(blocks, inside, {head}, count, found)
        counts, nested = Counts(), set().union(*(loop_members for loop_members in _cycles(inside))) if depth else set()
        own = [instruction for number in sorted(members - nested) for instruction in blocks[number].instructions]
        for instruction in own:
            count(counts, instruction)
        frames = frozenset(instruction.frames for instruction in own)
        found.append(Loop(blocks[head].label, counts, len(found) - before, frames))
        outermost += 1
    return outermost


def _reachable(graph: dict[int, set[int]], start: int) -> set[int]:
    seen, waiting = {start}, [start]
    while waiting:
        for number in graph[waiting.pop()] - seen:
            seen.add(number)
            waiting.append(number)
    return seen


def _cycles(graph: dict[int, set[int]]) -> Iterator[set[int]]:
    """The strongly connected components that hold an edge, in order of their first member."""
    reach = {number: 0 for number in graph}  # as bits
    changed = True
    while changed:
        changed = False
        for number in reversed(graph):  # mostly forward edges, so most are settled by the first turn
            after = 0
            for successor in graph[number]:
                after |= reach[successor] | 1 << successor
            changed |= after != reach[number]
            reach[number] = after
    done = 0
    for number in graph:
        if reach[number] >> number & 1 and not done >> number & 1:
            members = {m for m in graph if reach[number] >> m & 1 and reach[m] >> number & 1}
            done |= sum(1 << m for m in members)
            yield members


_BULK = ("UTMALDG", "UTMASTG", "UTMAREDG", "UBLKCP", "UBLKRED")
_FLOATS = {
    "FADD": 1,
    "FMUL": 1,
    "FFMA": 1,
    "FADD32I": 1,
    "FMUL32I": 1,
    "FFMA32I": 1,
    "FADD2": 2,
    "FMUL2": 2,
    "FFMA2": 2,
}


def count_sass(counts: Counts, instruction: Instruction) -> None:
    """Add an instruction of NVIDIA's.

    Raises:
        RuntimeError: it moves a number of bytes that it does not say.
    """
    base, *suffixes = instruction.name.split(".")
    if base in _BULK:
        raise RuntimeError(f"{instruction.name} copies in bulk, and how many bytes is not in the instruction")
    counts.instructions += 1
    counts.issue += 1
    counts.floats += _FLOATS.get(base, 0)
    counts.special += base == "MUFU"
    # REDUX, CREDUX: a reduction over the lanes in one instruction. Votes only ask whether a branch is uniform.
    counts.shuffles += base in ("SHFL", "REDUX", "CREDUX", "MATCH")
    counts.barriers += base in ("BAR", "SYNCS", "UCGABAR_ARV", "UCGABAR_WAIT", "MEMBAR", "FENCE")
    counts.shared += base in ("LDS", "STS", "LDSM", "STSM", "ATOMS", "LDGSTS")
    counts.calls += base == "CALL" and not instruction.operands.startswith("`(.L")  # see `listing`
    if base in ("LDG", "LD", "LDGSTS"):
        counts.loads.append(Access(_sass_bytes(suffixes), instruction.frames))
    elif base in ("STG", "ST", "RED", "REDG", "ATOM", "ATOMG"):
        counts.stores.append(Access(_sass_bytes(suffixes), instruction.frames))


def _sass_bytes(suffixes: Sequence[str]) -> int:
    """Of an access whose mnemonic has these suffixes: the narrowest width that one of them names, or 4."""
    widths = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
    return next((widths[suffix] for suffix in suffixes if suffix in widths), 4)


_QUARTER = re.compile(
    r"v_((exp|log|rcp|rsq|sqrt|sin|cos)_(legacy_|iflag_)?f(16|32|64)|mul_(lo|hi)_[iu]32|mad_[iu]64_[iu]32)(_|$)"
)
_SPECIAL = re.compile(r"v_(exp|log|rcp|rsq|sqrt|sin|cos)_")
# Of the sequencer, which executes them without the scalar unit.
_INTERNAL = (
    "s_waitcnt",
    "s_nop",
    "s_barrier",
    "s_endpgm",
    "s_sleep",
    "s_setprio",
    "s_branch",
    "s_cbranch",
    "s_sethalt",
)
_MEMORY = re.compile(r"(?:buffer|global|flat)_(load|store|atomic)_(\w+)")
_ACCESS_BYTES = {
    "dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16, "b32": 4, "b64": 8, "b96": 12, "b128": 16,
    "ubyte": 1, "sbyte": 1, "byte": 1, "ushort": 2, "sshort": 2, "short": 2,
}  # fmt: skip


def count_amdgcn(counts: Counts, instruction: Instruction) -> None:
    """Add an instruction of AMD's.

    Raises:
        RuntimeError: it moves a number of bytes that is not known here.
    """
    name = instruction.name
    counts.instructions += 1
    if name.startswith("v_"):
        counts.issue += 4 if _QUARTER.match(name) else 1
        counts.special += _SPECIAL.match(name) is not None
    elif name.startswith("s_") and not name.startswith(_INTERNAL):
        counts.scalar += 1
    # Moves between lanes: by way of shared memory's crossbar, or as a modifier of a vector instruction's operand.
    crosses = re.match(r"ds_(b?permute|swizzle)|v_permlane", name) is not None
    counts.shuffles += crosses or ("_dpp" in name and "quad_perm:[0,1,2,3]" not in instruction.operands)
    counts.barriers += name in ("s_barrier", "buffer_wbl2", "buffer_inv")
    counts.shared += name.startswith("ds_") and not crosses
    if found := _MEMORY.match(name):
        kind, width = found.groups()
        access = Access(_amdgcn_bytes(instruction, kind, width), instruction.frames)
        (counts.loads if kind == "load" else counts.stores).append(access)


def _amdgcn_bytes(instruction: Instruction, kind: str, width: str) -> int:
    if kind == "atomic":
        return 8 if width.endswith(("_x2", "f64")) else 4
    # `lds_dwordx4` goes to shared memory without a register; `short_d16_hi` into half of one.
    size = _ACCESS_BYTES.get(re.sub(r"^lds_|_d16(_hi)?$", "", width))
    if size is None:
        raise RuntimeError(f"{instruction.name} moves a number of bytes that is not known here")
    return size

"""A kernel's machine code, read from what the disassemblers print: instructions, where they may go next, their source.

NVIDIA's is printed by `nvdisasm -gi`, which comes with Triton, AMD's is the assembly that the compiler leaves. Both
name the lines of Python that an instruction comes from, through every function that was inlined; that is how a loop
is recognised, since addresses and registers do not say which tensor a load reads.

Branches are followed as the architectures define them. What cannot be followed (a computed jump) or read is refused,
because counts of a part of a kernel would look like counts of the kernel.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

Frame = tuple[str, int]
"""(name of a Python file, line); line 0 where the compiler has lost it."""
Next = tuple[str | None, bool]
"""Where an instruction that ends a block goes: a label or none, and whether what follows it may come next."""


@dataclass(frozen=True)
class Instruction:
    """One machine instruction.

    Attributes:
        name: the mnemonic with its suffixes, `LDG.E.128` or `buffer_load_dwordx4`.
        operands: the rest as printed, without a guarding predicate.
        frames: the source line, then that of the call which was inlined there, and so on out to the kernel.
        guarded: whether a predicate decides if it is executed (NVIDIA).
    """

    name: str
    operands: str
    frames: tuple[Frame, ...] = ()
    guarded: bool = False


@dataclass
class Block:
    """Instructions that are executed one after another, and the numbers of the blocks that may follow."""

    label: str
    instructions: list[Instruction] = field(default_factory=list)
    successors: set[int] = field(default_factory=set)


def read_sass(text: str) -> list[Block]:
    """The kernel in a listing of `nvdisasm -gi`, its first block first.

    Raises:
        RuntimeError: there is no code, or of more than one kernel; a line cannot be read; a jump cannot be followed.
    """
    sections = re.findall(r"^\s*\.section\s+(\.text\.[^\s,]+)", text, re.MULTILINE)
    if len(sections) != 1:
        raise RuntimeError(f"the listing should hold one kernel, it holds {len(sections)}: {text.strip()[:200]!r}")
    items = list(_sass_items(text.split(sections[0], 1)[1]))
    return _blocks(items, _sass_next)


def read_amdgcn_code(text: str) -> list[Block]:
    """The kernel in AMD's assembly, its first block first.

    Raises:
        RuntimeError: as `read_sass`.
    """
    functions = re.findall(r"^\s*\.type\s+([^\s,]+),@function", text, re.MULTILINE)
    if len(functions) != 1:
        raise RuntimeError(f"the assembly should hold one function, it holds {len(functions)}: {text.strip()[:200]!r}")
    body = re.search(rf"^{re.escape(functions[0])}:(.*?)^\.Lfunc_end", text, re.MULTILINE | re.DOTALL)
    if body is None:
        raise RuntimeError(f"the assembly does not say where {functions[0]} begins and ends")
    return _blocks(list(_amdgcn_items(body.group(1))), _amdgcn_next)


_SASS_LINE = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(@!?U?P[0-9T]\s+)?([A-Z][A-Z0-9_.]*)([^;]*);")
_SASS_LABEL = re.compile(r"^([.$\w]+):\s*$")
_SASS_SOURCE = re.compile(r'^\s*//## File "([^"]*)", line (\d+)(.*)$')


def _sass_items(text: str) -> Iterator[str | Instruction]:
    """Labels (str) and instructions, in order."""
    frames: list[Frame] = []
    complete = True  # the next source line begins another list of frames
    for line in text.splitlines():
        if source := _SASS_SOURCE.match(line):
            if complete:
                frames = []
            frames.append((source.group(1).rpartition("/")[2], int(source.group(2))))
            complete = "inlined at" not in source.group(3)
        elif label := _SASS_LABEL.match(line):
            yield label.group(1)
        elif found := _SASS_LINE.match(line):
            guard, name, operands = found.groups()
            yield Instruction(name, operands.strip(), tuple(frames), guard is not None)
        elif re.match(r"^\s*/\*[0-9a-f]+\*/\s", line):
            raise RuntimeError(f"a line of the listing cannot be read: {line.strip()!r}")
        elif line.startswith("//-----"):  # the next section
            return


def _sass_next(instruction: Instruction) -> Next | None:
    """None where it does not end a block."""
    base = instruction.name.partition(".")[0]
    if base in ("BRA", "JMP"):
        target = re.search(r"`\(([^)]+)\)", instruction.operands)
        if target is None:
            raise RuntimeError(f"{instruction.name} {instruction.operands} does not say where it goes")
        # Conditions are a guard, a predicate before the label, or the mask of BRA.DIV.
        return target.group(1), instruction.guarded or not instruction.operands.startswith("`")
    if base in ("BRX", "BRXU", "JMX", "JMXU"):
        raise RuntimeError(f"{instruction.name} jumps to a computed address, which cannot be followed")
    if base in ("EXIT", "RET", "KILL"):
        return None, instruction.guarded
    if base == "CALL" and (target := re.match(r"`\((\.L[^)]*)\)", instruction.operands)):
        return target.group(1), True  # within the kernel it is a jump, which ptxas for sm_80 leaves loops by
    return None  # any other CALL comes back to what follows


_AMD_LABEL = re.compile(r"^([.$\w]+):")
_AMD_LINE = re.compile(r"^\s+([a-z][a-z0-9]*_\w+)\s*([^;]*)")
_AMD_SOURCE = re.compile(r"^\s*\.loc\s[^;]*;(.*)$")


def _amdgcn_items(text: str) -> Iterator[str | Instruction]:
    """As `_sass_items`."""
    frames: tuple[Frame, ...] = ()
    for line in text.splitlines():
        if source := _AMD_SOURCE.match(line):
            frames = tuple((name, int(number)) for name, number in re.findall(r"([\w-]+\.py):(\d+):", source.group(1)))
        elif label := _AMD_LABEL.match(line):
            yield label.group(1)
        elif found := _AMD_LINE.match(line):
            yield Instruction(found.group(1), found.group(2).strip(), frames)
        elif not re.match(r"^\s*(;.*|\.\w.*)?$", line):
            raise RuntimeError(f"a line of the assembly cannot be read: {line.strip()!r}")


def _amdgcn_next(instruction: Instruction) -> Next | None:
    name = instruction.name
    if name == "s_branch" or name.startswith("s_cbranch_"):
        return instruction.operands, name != "s_branch"
    if name in ("s_setpc_b64", "s_swappc_b64", "s_call_b64"):
        raise RuntimeError(f"{name} jumps to a computed address, which cannot be followed")
    return (None, False) if name == "s_endpgm" else None


def _blocks(items: list[str | Instruction], following: Callable[[Instruction], Next | None]) -> list[Block]:
    """Blocks of labels and instructions, joined by `following`, which is `_sass_next` or `_amdgcn_next`."""
    ends = {index: following(item) for index, item in enumerate(items) if isinstance(item, Instruction)}
    if not ends:
        raise RuntimeError("the listing holds no instructions")
    wanted = {end[0] for end in ends.values() if end is not None}
    blocks, number_of = [Block("entry")], dict[str, int]()
    jumps: list[tuple[int, str]] = []

    def begin(label: str, falls: bool) -> None:
        if falls:
            blocks[-1].successors.add(len(blocks))
        blocks.append(Block(label))

    for index, item in enumerate(items):
        if isinstance(item, str):
            if item in wanted:
                begin(item, True)
                number_of[item] = len(blocks) - 1
            continue
        blocks[-1].instructions.append(item)
        end = ends[index]
        if end is not None:
            target, falls = end
            if target is not None:
                jumps.append((len(blocks) - 1, target))
            begin(f"after {item.name}", falls)
    for source, target in jumps:
        if target not in number_of:
            raise RuntimeError(f"a branch goes to {target}, which the listing does not have")
        blocks[source].successors.add(number_of[target])
    return blocks

"""Compile every kernel in every configuration that the package ships, on a machine that needs no GPU.

    python -m grade_kernels.aot                            all configurations for all targets
    python -m grade_kernels.aot --quick                    about sixty, each kernel at least once for each target
    python -m grade_kernels.aot --target sm_90 --list      what there is, without compiling

One line a compilation: registers, spills, shared memory, warps, and of the kernels that stream logits the instructions
and bytes of an entry with the ceiling that these set.  The exit status is 1 if anything spills or does not compile, or
if threads exchange anything in a loop that streams logits (a shuffle, a barrier).

The configurations come from the launchers themselves: `grade_kernels.aot.cases` calls them, `launch.recording` notes
what they would have launched, and Triton's JIT says how it would specialise that.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any, TextIO

from torch import Tensor

from grade_kernels.aot import binary, table
from grade_kernels.aot.binary import TARGETS, Configuration
from grade_kernels.common.environment import check_triton, interpreting

# Compilations of --quick.
_QUICK = 60
# A tensor whose rows are this long is one of logits and may exceed 2 GiB, which AMD's compiler treats apart.
_LOGITS_WIDTH = 2**14


class _Pointer:
    """An argument that stands for a tensor: what Triton's JIT asks of one, with alignment and size made explicit.

    Allocations are aligned; views are as far from that as their offset.
    """

    def __init__(self, tensor: Tensor, large: bool):
        self.dtype, self._offset = tensor.dtype, tensor.storage_offset() * tensor.element_size()
        self._bytes = 2**31 if large else tensor.untyped_storage().nbytes()

    def data_ptr(self) -> int:
        return 4096 + int(self._offset)

    def ptr_range(self) -> int:
        return self._bytes


def configuration(launch: Any, target: str, large_logits: bool = False) -> Configuration:
    """How Triton's JIT would specialise a recorded launch on `target`.

    Its own binder is asked, which needs no device (Triton 3.6 to 3.9 have it alike), so types, ints that are 1,
    divisibility by 16 and `do_not_specialize` follow its rules.  `large_logits` makes tensors with long rows
    exceed 2 GiB.
    """
    from grade_kernels.triton_ops.launch import compile_options, constants_for

    kernel, where = launch.kernel, TARGETS[target]
    hip = where.backend == "hip"
    options = compile_options(launch.num_warps, launch.max_registers, where.warp_size, hip)
    args = [
        _Pointer(a, large_logits and a.dim() > 0 and a.shape[-1] >= _LOGITS_WIDTH) if isinstance(a, Tensor) else a
        for a in launch.args
    ]
    backend, bind = _binder(kernel, target)
    fixed = {**options, **constants_for(launch.constants, hip)}
    bound, specialization, rest = bind(*args, **fixed)
    _, signature, constants, attrs = kernel._pack_args(backend, fixed, bound, specialization, rest)
    return Configuration(target, kernel.fn.__module__, kernel.fn.__name__, options, signature, constants, attrs)


@cache
def _binder(kernel: Any, target: str) -> tuple[Any, Any]:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    where = TARGETS[target]
    backend = make_backend(GPUTarget(where.backend, where.arch, where.warp_size))
    return backend, create_function_from_signature(kernel.signature, kernel.params, backend)


def configurations(launches: Iterable[Any], targets: Sequence[str]) -> list[Configuration]:
    """The distinct ones of recorded launches, in their order, for one target after another."""
    launches, found = list(launches), dict[Any, Configuration]()
    for target in targets:
        for launch in launches:
            for large in (False, True) if TARGETS[target].backend == "hip" else (False,):
                this = configuration(launch, target, large)
                found.setdefault(this.key, this)
    return list(found.values())


def quick(every: Sequence[Configuration], limit: int = _QUICK) -> list[Configuration]:
    """About `limit` of them: each kernel for each target, the largest configurations first."""
    ranked: dict[tuple[str, str], list[Configuration]] = {}
    for one in sorted(every, key=_size, reverse=True):
        ranked.setdefault((one.target, one.name), []).append(one)
    chosen = [group[0] for group in ranked.values()]
    depth = 1
    while len(chosen) < limit and any(len(group) > depth for group in ranked.values()):
        chosen += [group[depth] for group in ranked.values() if len(group) > depth][: limit - len(chosen)]
        depth += 1
    return chosen


def _size(one: Configuration) -> tuple[float, int, int]:
    """A guess of the work of a thread: entries of its tiles, then pointers, then wide types."""
    entries = 1.0
    for value in one.constants.values():
        entries *= value if isinstance(value, int) and value > 1 else 1
    pointers = [kind for kind in one.signature.values() if kind.startswith("*")]
    return entries / one.num_warps, len(pointers), sum(kind == "*fp32" for kind in pointers)


def check(every: Sequence[Configuration], jobs: int, path: str | None = None, out: TextIO | None = None) -> int:
    """Compile, print the table and its summary to `out`, write it to the CSV file `path`; the exit status."""
    import triton

    out = out or sys.stdout
    print(table.LEGEND, table.HEADER, sep="\n", file=out, flush=True)
    rows = []
    with table.Table(path, triton.__version__) as written:
        for row in binary.compile_all(every, jobs):
            rows.append(row)
            written.add(row)
            print(table.line(row), file=out, flush=True)
    return 0 if table.print_summary(rows, triton.__version__, out) else 1


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m grade_kernels.aot",
        description="Compile every kernel for every target without a GPU; fail on register spills, "
        "and on shuffles and barriers in the loops that stream logits.",
    )
    made.add_argument("--target", action="append", metavar="NAME", help=f"one of {', '.join(TARGETS)}; repeatable")
    made.add_argument("--kernel", metavar="NAME", help="only kernels whose name contains this")
    made.add_argument("--quick", action="store_true", help=f"about {_QUICK} compilations, the largest first")
    made.add_argument("--csv", metavar="PATH", help="also write the table there")
    made.add_argument("--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="processes (default: cores)")
    made.add_argument("--list", action="store_true", help="print the configurations without compiling")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0, 1 for spills, exchanges or failed compilations, 2 where nothing could be tried."""
    options = parser().parse_args(argv)
    try:
        every = _wanted(options)
    except (RuntimeError, ValueError) as error:
        print(f"grade_kernels.aot: {error}", file=sys.stderr)
        return 2
    if options.list:
        for one in every:
            print(f"{one.target:7} {one.name:28} {one.num_warps:2} warps  {one}")
        print(f"\n{len(every)} configurations of {len({one.name for one in every})} kernels")
        return 0
    return check(every, options.jobs, options.csv)


def _wanted(options: argparse.Namespace) -> list[Configuration]:
    targets = list(dict.fromkeys(options.target or TARGETS))
    for target in targets:
        if target not in TARGETS:
            raise ValueError(f"--target must be one of {', '.join(TARGETS)}, got {target!r}")
    if options.jobs < 1:
        raise ValueError(f"--jobs must be at least 1, got {options.jobs}")
    if interpreting():
        raise RuntimeError("TRITON_INTERPRET is set, which replaces the compiler by an interpreter; unset it")
    check_triton()
    if options.csv is not None and not options.list:
        try:
            open(options.csv, "a").close()
        except OSError as error:
            raise ValueError(f"--csv {options.csv!r} cannot be written: {error.strerror}; name another file") from None
    if not options.list and any(TARGETS[target].backend == "cuda" for target in targets):
        binary.tool_path("cuobjdump")
        binary.tool_path("nvdisasm")

    from grade_kernels.aot import cases

    every = configurations(cases.record(), targets)
    if options.kernel:
        names = sorted({one.name for one in every})
        every = [one for one in every if options.kernel in one.name]
        if not every:
            raise ValueError(f"--kernel {options.kernel!r} is in none of {', '.join(names)}")
    return quick(every) if options.quick else every

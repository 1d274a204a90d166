"""Compile a kernel for a GPU that need not be here, and read from the binary what it takes of one.

The compiler's own register and spill counts are filled in only when a binary is loaded onto a device, so they are
read from the binary: by `cuobjdump`, which comes with Triton, or from the metadata of AMD's assembly. The loops that
stream logits are counted in the machine code (`streams`).
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from grade_kernels.aot import listing, loops
from grade_kernels.aot.streams import STREAMS, Streamed, find_streams


@dataclass(frozen=True)
class Target:
    """An architecture, and the shared memory (bytes) that one of its blocks can have."""

    backend: str
    arch: int | str
    warp_size: int
    shared_limit: int


TARGETS = {
    "sm_80": Target("cuda", 80, 32, 163 * 1024),
    "sm_90": Target("cuda", 90, 32, 227 * 1024),
    "sm_100": Target("cuda", 100, 32, 227 * 1024),
    "gfx942": Target("hip", "gfx942", 64, 64 * 1024),
}


@dataclass(frozen=True)
class Configuration:
    """One compilation: what the JIT would key a launch by, in a form that can go to another process.

    `options` are the compiler's; `signature` is by parameter name; `constants` and `attrs` are by path, which is
    (index of the parameter,).
    """

    target: str
    module: str
    kernel: str
    options: dict[str, Any]
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attrs: dict[tuple[int, ...], list]

    @property
    def name(self) -> str:
        """The kernel with its file, `kl._stats_kernel`."""
        return f"{self.module.rpartition('.')[2]}.{self.kernel}"

    @property
    def num_warps(self) -> int:
        return self.options["num_warps"]

    @property
    def key(self) -> tuple:
        """Equal for two launches that share a compilation."""
        attrs = sorted((path, tuple(map(tuple, value))) for path, value in self.attrs.items() if value)
        constants = [(path, repr(value)) for path, value in sorted(self.constants.items())]
        signature = tuple(self.signature.items())
        options = tuple(sorted(self.options.items()))
        return self.target, self.module, self.kernel, options, signature, tuple(constants), tuple(attrs)

    def given(self, parameter: str) -> bool:
        """Whether it is a tensor, or a constant that is neither None nor false."""
        return bool(self.constants.get(self._path(parameter), True))

    def constant(self, parameter: str) -> int:
        """The value of a constexpr parameter."""
        return self.constants[self._path(parameter)]

    def _path(self, parameter: str) -> tuple[int]:
        if parameter not in self.signature:
            raise RuntimeError(f"{self.name} has no parameter {parameter}, which grade_kernels/aot/streams.py names")
        return (list(self.signature).index(parameter),)

    def __str__(self) -> str:
        """Arguments as name:type, those without a mark divisible by 16 (pointers: aligned); constants as name=value.

        A pointer's type is that of its entries; `!` marks what is not divisible, `+` what may exceed 2 GiB (AMD).
        """
        words = []
        bounded = self.target.startswith("gfx")
        for index, (name, kind) in enumerate(self.signature.items()):
            if (index,) in self.constants:
                words.append(f"{name}={self.constants[index,]}")
            elif kind.startswith("*") or kind in ("i32", "i64"):
                attrs = {attr for attr, _ in self.attrs.get((index,), ())}
                mark = "" if "tt.divisibility" in attrs else "!"
                mark += "+" if bounded and kind.startswith("*") and "tt.pointer_range" not in attrs else ""
                words.append(f"{name}:{kind.lstrip('*')}{mark}")
        if "maxnreg" in self.options:
            words.append(f"maxnreg={self.options['maxnreg']}")
        return " ".join(words)


@dataclass(frozen=True)
class Resources:
    """Per thread: registers, and bytes or registers of spills (0 is none).  Per block: shared memory in bytes."""

    registers: int
    spills: int
    shared: int


@dataclass(frozen=True)
class Row:
    """The outcome of one compilation; `error` is empty where it went well, spills and exchanges included.

    `streamed` is None of a kernel that streams no logits.
    """

    configuration: Configuration
    seconds: float
    resources: Resources | None = None
    error: str = ""
    streamed: Streamed | None = None


def compile_one(configuration: Configuration) -> Row:
    """Compile here and now; what goes wrong is a row with its first line."""
    start = time.perf_counter()
    try:
        compiled = _compile(configuration)
        seconds = time.perf_counter() - start
        found, streamed = resources(compiled), streams(configuration, compiled)
    except Exception as error:
        return Row(configuration, time.perf_counter() - start, error=first_line(error))
    limit = TARGETS[configuration.target].shared_limit
    problem = f"needs {found.shared} bytes of shared memory, a block has {limit}" if found.shared > limit else ""
    return Row(configuration, seconds, found, problem, streamed)


def _compile(configuration: Configuration) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    target = TARGETS[configuration.target]
    kernel = getattr(importlib.import_module(configuration.module), configuration.kernel)
    source = ASTSource(kernel, configuration.signature, configuration.constants, configuration.attrs)
    where = GPUTarget(target.backend, target.arch, target.warp_size)
    return triton.compile(source, target=where, options=dict(configuration.options))


def first_line(error: BaseException) -> str:
    """The message of the innermost cause; Triton wraps it in the source around it."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = getattr(error, "error_message", None) or str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def resources(compiled: Any) -> Resources:
    """Of what `triton.compile` returned.  Shared memory that is sized at launch is known to the compiler only."""
    if "amdgcn" in compiled.asm:
        found = read_amdgcn(compiled.asm["amdgcn"])
    else:
        found = read_cuobjdump(_disassembled("cuobjdump", compiled.asm["cubin"], "-res-usage"))
        # A frame that no instruction touches is left over from an allocation that the compiler removed.
        if found.spills and not touches_local_memory(_disassembled("cuobjdump", compiled.asm["cubin"], "-sass")):
            found = replace(found, spills=0)
    return Resources(found.registers, found.spills, max(found.shared, compiled.metadata.shared))


def streams(configuration: Configuration, compiled: Any) -> Streamed | None:
    """The loops that stream logits in what `triton.compile` returned; None for a kernel that has none."""
    if configuration.name not in STREAMS:
        return None
    if "amdgcn" in compiled.asm:
        found = loops.loops(listing.read_amdgcn_code(compiled.asm["amdgcn"]), loops.count_amdgcn)
    else:
        text = _disassembled("nvdisasm", compiled.asm["cubin"], "-gi", "-c")
        found = loops.loops(listing.read_sass(text), loops.count_sass)
    return find_streams(configuration, found)


def read_cuobjdump(text: str) -> Resources:
    """Of `cuobjdump -res-usage`; spills are bytes of stack and of local memory."""
    found = dict(re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", text))
    if len(found) < 4:
        raise RuntimeError(f"cuobjdump did not report registers and stack: {text.strip()[:200]!r}")
    numbers = {name: int(value) for name, value in found.items()}
    return Resources(numbers["REG"], numbers["STACK"] + numbers["LOCAL"], numbers["SHARED"])


def touches_local_memory(sass: str) -> bool:
    """Whether a listing of `cuobjdump -sass` loads from or stores to local memory."""
    if "Function" not in sass:
        raise RuntimeError(f"cuobjdump did not list the kernel: {sass.strip()[:200]!r}")
    return re.search(r"\b(LDL|STL)\b", sass) is not None


def read_amdgcn(text: str) -> Resources:
    """Of the kernel's metadata; spills are spilled vector registers, or bytes of scratch if there are none of those.

    Scalar registers are spilled into lanes of vector registers, which touches no memory and is not counted; into
    memory would be scratch.
    """
    fields = ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")
    names = (*fields, "group_segment_fixed_size")
    # The same words, without a colon, are assembler symbols further up.
    found = {name: re.findall(rf"^\s*(?:-\s+)?\.{name}:\s*(\d+)", text, re.MULTILINE) for name in names}
    missing = [name for name, values in found.items() if not values]
    if missing:
        raise RuntimeError(f"the assembly has no metadata .{missing[0]}")
    vgprs, vgpr_spills, scratch, shared = (max(map(int, found[name])) for name in names)
    return Resources(vgprs, vgpr_spills or scratch, shared)


def tool_path(name: str) -> Path:
    """Where Triton keeps `cuobjdump` or `nvdisasm`.

    Raises
    ------
    RuntimeError
        It is not there.
    """
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    if not path.exists():
        raise RuntimeError(
            f"{path} is missing, and binaries are read with it; reinstall Triton from its wheel, "
            "or compile for AMD only with --target gfx942"
        )
    return path


def _disassembled(tool: str, cubin: bytes, *options: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool_path(tool), *options, file.name], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{tool} failed: {done.stderr.strip()}")
    return done.stdout


def compile_all(configurations: Sequence[Configuration], jobs: int) -> Iterator[Row]:
    """Rows as they arrive, from `jobs` processes.  A process that the compiler takes down is a row and is replaced.

    Every compilation starts from an empty cache, so its seconds are those of the compiler.
    """
    context = multiprocessing.get_context("spawn")
    waiting = list(reversed(configurations))
    with tempfile.TemporaryDirectory(prefix="grade-kernels-aot-") as cache:
        workers = [_Worker(context, cache) for _ in range(min(jobs, len(waiting)))]
        try:
            for worker in workers:
                worker.give(waiting.pop())
            busy = {worker.pipe: worker for worker in workers}
            while busy:
                for pipe in wait(list(busy)):
                    worker = busy.pop(pipe)
                    yield worker.take()
                    if waiting:
                        worker.give(waiting.pop())
                        busy[worker.pipe] = worker
        finally:
            for worker in workers:
                worker.stop()


class _Worker:
    """A process that compiles one configuration after another."""

    def __init__(self, context: Any, cache: str):
        self._context, self._cache = context, cache
        self._job: Configuration | None = None
        self._start()

    def _start(self) -> None:
        self.pipe, theirs = self._context.Pipe()
        self._process = self._context.Process(target=_serve, args=(theirs, self._cache), daemon=True)
        self._process.start()
        theirs.close()  # so that the death of the process ends the pipe

    def give(self, job: Configuration) -> None:
        self._job, self._since = job, time.perf_counter()
        self.pipe.send(job)

    def take(self) -> Row:
        try:
            return self.pipe.recv()
        except EOFError:
            self._process.join()
            seconds, code = time.perf_counter() - self._since, self._process.exitcode
            self._start()
            assert self._job is not None  # `give` comes before `take`
            return Row(self._job, seconds, error=f"the compiler took its process down (exit code {code})")

    def stop(self) -> None:
        self.pipe.close()
        self._process.terminate()
        self._process.join()


def _serve(pipe: Any, cache: str) -> None:
    os.environ["TRITON_CACHE_DIR"] = cache
    while True:
        try:
            job = pipe.recv()
        except (EOFError, KeyboardInterrupt):
            return
        pipe.send(compile_one(job))

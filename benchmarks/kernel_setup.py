"""What a kernel's set-up consists of, and how one implementation of it becomes a call that can be timed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Outputs = dict[str, Tensor]


@dataclass(frozen=True)
class Sizes:
    """N rows, vocabulary V, width d, k candidates; the decoding sizes; draws of `rao`."""

    rows: int
    vocab: int
    width: int
    k: int
    decode_rows: tuple[int, ...]
    decode_vocab: int
    samples: int = 16


# Qwen's vocabulary and the width of a 4B model; a batch of 16 responses of 1,024 tokens.
GPU = Sizes(16384, 151936, 2560, 256, (1, 16, 64), 131072)
GPU_QUICK = Sizes(1024, 151936, 2560, 256, (1, 16, 64), 131072)
# One core's seconds: arrays [N, V] of 32 MiB.
CPU = Sizes(256, 32768, 256, 64, (1, 16), 131072)
CPU_QUICK = Sizes(64, 8192, 64, 32, (1, 16), 8192)
# Triton's interpreter runs a program's every operation in NumPy.
INTERPRETER = Sizes(8, 4096, 32, 16, (1,), 4096, 2)


@dataclass(frozen=True)
class Goal:
    """What a row's number should reach on a GPU."""

    column: str  # ms, copy_percent or ratio
    bound: float

    def met(self, value: float) -> bool:
        return value <= self.bound if self.column == "ms" else value >= self.bound

    def __str__(self) -> str:
        if self.column == "ms":
            return f"<= {1e3 * self.bound:.0f} us"
        return f">= {self.bound:.0f} {'% of copy' if self.column == 'copy_percent' else 'x ours'}"


@dataclass
class Run:
    """One implementation.

    `fn(**arguments)` returns its outputs by name; gradients of the arguments `wrt` are added as `d_<argument>`.
    """

    name: str  # ours, textbook, compiled, liger, ...
    backend: str
    fn: Callable[..., Outputs]
    mode: str = "forward"  # forward, backward (of a graph that is already there) or forward+backward
    wrt: tuple[str, ...] = ()
    # The gradients that arrive, by output.
    cotangents: Callable[[], Outputs] = dict
    # The outputs at the checked rows.
    view: Callable[[Outputs, Tensor], Outputs] = lambda outputs, rows: {n: t[rows] for n, t in outputs.items()}
    own: tuple[str, ...] = ()  # arguments that it overwrites, so that it gets copies
    needs: int = 0  # estimate of its peak memory above the inputs, bytes
    compile: bool = False
    graph: bool = False  # replay a captured CUDA graph
    goal: Goal | None = None
    missing: str = ""  # why it cannot run here
    note: str = ""


@dataclass
class Setup:
    """Inputs, float64 truth and implementations of one kernel in one variant, shape and dtype."""

    kernel: str
    variant: str
    shape: str
    dtype: torch.dtype
    arguments: dict[str, Tensor]
    rows: Tensor  # where the outputs are checked
    error: Callable[[Outputs], float]  # of the outputs at these rows against the textbook in float64
    moved: int  # bytes that must move, whatever the implementation
    formula: str  # how they are counted
    runs: list[Run] = field(default_factory=list)
    flops: int = 0

    @property
    def tolerance(self) -> float:
        """Largest relative error: an implementation that exceeds it computes something else.

        float32: sums of 150,000 terms. 16 bits: a textbook may round at every step, which costs percents.
        """
        return 1e-3 if self.dtype == torch.float32 else 5e-2


def start(run: Run, arguments: dict[str, Tensor], cotangents: Outputs) -> Callable[[], Outputs]:
    """The call to time.  For mode "backward" the forward pass has run when this returns."""
    leaves = {name: t.clone() if name in run.own else t.detach() for name, t in arguments.items()}
    for name in run.wrt:
        leaves[name].requires_grad_()
    fn = compiled(run.fn) if run.compile else run.fn

    def gradients(outputs: Outputs, retain: bool) -> Outputs:
        wanted = [outputs[name] for name in cotangents]
        arriving = list(cotangents.values())
        grads = torch.autograd.grad(wanted, [leaves[n] for n in run.wrt], arriving, retain_graph=retain)
        return {f"d_{name}": grad for name, grad in zip(run.wrt, grads, strict=True)}

    @torch.no_grad()
    def forward() -> Outputs:
        return fn(**leaves)

    def both() -> Outputs:
        outputs = fn(**leaves)
        grads = gradients(outputs, retain=False)
        return {name: t.detach() for name, t in outputs.items()} | grads

    if run.mode == "backward":
        outputs = fn(**leaves)
        return lambda: gradients(outputs, retain=True)
    return forward if run.mode == "forward" else both


def compiled(fn: Callable[..., Outputs]) -> Callable[..., Outputs]:
    """torch.compile for these shapes, from a clean start; the backward pass may run repeatedly."""
    import torch._functorch.config

    torch._dynamo.reset()
    torch._functorch.config.donated_buffer = False
    return torch.compile(fn, dynamic=False, fullgraph=True)


def relative_error(value: Tensor, exact: Tensor) -> float:
    """Largest error relative to the largest entry of the exact result; of integers the share of wrong ones."""
    if value.shape != exact.shape:
        return float("inf")
    if not exact.is_floating_point():
        return float((value != exact).double().mean())
    value, exact = value.detach().double(), exact.detach().double()
    error = (value - exact).abs().max() / exact.abs().max().clamp_min(1e-300)
    return float("inf") if error.isnan() else float(error)


def worst(outputs: Outputs, exact: Outputs) -> float:
    """The largest relative error among the outputs that both have; infinite if they share none."""
    shared = [name for name in exact if name in outputs]
    return max((relative_error(outputs[name], exact[name]) for name in shared), default=float("inf"))


def liger(name: str) -> tuple[Any, str | None]:
    """(the function liger_kernel.transformers.functional.<name>, why it is not to be had)."""
    if importlib.util.find_spec("liger_kernel") is None:
        return None, "liger_kernel is not installed (pip install liger-kernel)"
    try:
        from liger_kernel.transformers import functional
    except Exception as error:  # whatever a version that does not fit this torch or transformers raises
        return None, f"liger_kernel cannot be imported: {type(error).__name__}: {error}"
    found = getattr(functional, name, None)
    return found, "" if found else f"this version of liger_kernel has no {name}"

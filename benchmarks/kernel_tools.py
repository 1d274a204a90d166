"""What the set-ups of the kernels share: inputs, rows to check, names."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.kernel_setup import Run
from grade_kernels.backend import backend_for, interpreting


def generator(device: torch.device, seed: int = 0) -> torch.Generator:
    return torch.Generator(device=device).manual_seed(seed)


def normal(n: int, m: int, *, dtype: torch.dtype, device: torch.device, std: float, seed: int = 0) -> Tensor:
    """[n, m] of normal numbers, made in `dtype`, so that no wider copy exists even for a moment."""
    return torch.randn(n, m, dtype=dtype, device=device, generator=generator(device, seed)).mul_(std)


def both_ends(n: int, device: torch.device, count: int = 8) -> Tensor:
    """The first and the last `count` of n rows: the last ones lie past 2^31 entries in the sizes of a GPU."""
    return torch.tensor(sorted({*range(min(count, n)), *range(max(n - count, 0), n)}), device=device)


def backend_name(op: str, *tensors: Tensor) -> str:
    """torch, triton, or interpreter where Triton interprets its kernels on the CPU."""
    backend = backend_for(op, *tensors)
    return "interpreter" if backend == "triton" and interpreting() else backend


def with_compiled(textbook: Run) -> list[Run]:
    return [textbook, replace(textbook, name="compiled", backend="inductor", compile=True)]

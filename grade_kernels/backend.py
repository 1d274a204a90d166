"""Which implementation an operation takes: Triton on CUDA and ROCm tensors, PyTorch on the others.

`GRADE_KERNELS_BACKEND=torch|triton` forces one.  With `TRITON_INTERPRET=1`, set before Triton is imported,
Triton's interpreter runs the kernels on CPU tensors.  float64 takes the PyTorch path on every device, since the
kernels compute in float32, and so do more than 1,024 candidates a row, which would not fit in registers.
"""

from __future__ import annotations

import os
from types import ModuleType

import torch
from torch import Tensor

from grade_kernels.common.environment import VARIABLE, interpreting

# Most candidates of a row that the kernels hold in registers.
MOST_CANDIDATES = 1024


def backend_for(op_name: str, *tensors: Tensor, k: int | None = None) -> str:
    """The backend, "torch" or "triton", that runs `op_name` on `tensors`, with k candidates a row.

    Raises
    ------
    RuntimeError
        The Triton path is forced on tensors that it cannot take.
    TypeError
        It is forced on float64 tensors.
    ValueError
        It is forced on more than 1,024 candidates, or GRADE_KERNELS_BACKEND holds anything else than torch or
        triton.
    """
    forced = os.environ.get(VARIABLE, "")
    if forced not in ("", "torch", "triton"):
        raise ValueError(f"{VARIABLE} must be 'torch' or 'triton', or unset to choose by device, got {forced!r}")
    device = tensors[0].device
    double = any(t.dtype == torch.float64 for t in tensors)
    runs_here = device.type == "cuda" or (device.type == "cpu" and interpreting())
    many = k is not None and k > MOST_CANDIDATES
    if forced == "torch" or (forced == "" and (double or many or not runs_here)):
        return "torch"
    if double:
        raise TypeError(
            f"{VARIABLE}=triton, but {op_name} has float64 inputs and the kernels compute in float32; "
            f"convert them with .float(), or unset {VARIABLE}"
        )
    if not runs_here:
        raise RuntimeError(
            f"{VARIABLE}=triton, but {op_name} was given a tensor on {device}, where the kernels cannot run; "
            f"move it to a CUDA or ROCm device, set TRITON_INTERPRET=1 to interpret them on a CPU, "
            f"or unset {VARIABLE}"
        )
    if many:
        raise ValueError(
            f"{VARIABLE}=triton, but {op_name} was asked for {k} candidates a row and the kernels hold at most "
            f"{MOST_CANDIDATES}; ask for fewer, or unset {VARIABLE} for the PyTorch path"
        )
    return "triton"


def implementation(backend: str) -> ModuleType:
    """The package of a backend's operations: `torch_ops` or `triton_ops`, module for module alike."""
    if backend == "torch":
        from grade_kernels import torch_ops

        return torch_ops
    from grade_kernels import triton_ops

    return triton_ops

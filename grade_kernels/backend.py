"""Which implementation an operation takes.

`GRADE_KERNELS_BACKEND=torch|triton` forces one.  This version holds the PyTorch path only, so forcing
Triton is an error rather than a silent fall-back.
"""

from __future__ import annotations

import os

from torch import Tensor

VARIABLE = "GRADE_KERNELS_BACKEND"


def backend_for(op_name: str, tensor: Tensor) -> str:
    """The backend ("torch") that runs `op_name` on `tensor`.

    Raises
    ------
    RuntimeError
        GRADE_KERNELS_BACKEND=triton: there is no Triton path in this version.
    ValueError
        GRADE_KERNELS_BACKEND holds anything else than torch or triton.
    """
    forced = os.environ.get(VARIABLE, "")
    if forced in ("", "torch"):
        return "torch"
    if forced == "triton":
        raise RuntimeError(
            f"{VARIABLE}=triton, but the Triton path of {op_name} is not available in this version; "
            f"unset {VARIABLE} or set it to torch (the tensor is on {tensor.device})"
        )
    raise ValueError(f"{VARIABLE} must be 'torch' or 'triton', got {forced!r}")

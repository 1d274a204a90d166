"""`train.deterministic`: two runs on one kind of GPU, with the same libraries, give the same bits.

A CPU gives them in any case. On a GPU, some operations add in an order that changes from call to call: the backward
passes of fused attention, and whatever torch lists under `use_deterministic_algorithms`. Our own kernels do not.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextmanager
def deterministic(wanted: bool, device: torch.device) -> Iterator[None]:
    """Inside, operations on a GPU give the same result each time; torch raises an error at those that cannot.

    cuBLAS has to be told earlier, which `grade.processes.make_accelerator` does.
    """
    if not wanted or device.type != "cuda":
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False  # which would choose algorithms by their speed
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cudnn.benchmark = benchmark

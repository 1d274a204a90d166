"""What torch.compile's code generator has to be told on a CPU."""

from __future__ import annotations

from typing import Any

import torch

# Bits of the vectors that its code for an instruction set is written for; others have one width, or none.
_VECTOR_BITS = {"AVX2": 256, "AVX512": 512}


def vector_options() -> dict[str, Any]:
    """The width of the vectors that its code is written for, as options of Inductor; empty where there is one only.

    What it keeps on disk is found by the graph and the options. Torch up to 2.13 leaves the instruction set out: code
    written for narrow vectors (`ATEN_CPU_CAPABILITY=avx2`, another machine with the same folder) is found again,
    compiled for wide ones, and writes beyond the end of its arrays.
    """
    bits = _VECTOR_BITS.get(torch.backends.cpu.get_cpu_capability())
    return {} if bits is None else {"cpp.simdlen": bits}

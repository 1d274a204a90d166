"""What the environment decides for both backends: the switch, the interpreter, and which Triton there is."""

from __future__ import annotations

import os
import re

VARIABLE = "GRADE_KERNELS_BACKEND"
# First supported and first unsupported minor version of Triton.
TRITON_VERSIONS = ((3, 6), (3, 10))


def interpreting() -> bool:
    """Whether Triton interprets its kernels on the CPU (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def check_triton() -> None:
    """Refuse a missing or unsupported Triton in words; `triton_ops` asks before it defines a kernel.

    Raises
    ------
    RuntimeError
    """
    (first, stop), fix = TRITON_VERSIONS, f"or set {VARIABLE}=torch"
    works = f"{first[0]}.{first[1]} to {stop[0]}.{stop[1] - 1}"
    wanted = f"pip install 'triton>={first[0]}.{first[1]},<{stop[0]}.{stop[1]}'"
    try:
        import triton
    except Exception as error:  # a broken installation raises all sorts of things
        raise RuntimeError(
            f"Triton cannot be imported ({error}); the kernels work with {works}: {wanted}, {fix}"
        ) from None
    numbers = re.match(r"(\d+)\.(\d+)", triton.__version__)
    minor = tuple(map(int, numbers.groups())) if numbers else (0, 0)
    if not first <= minor < stop:
        raise RuntimeError(
            f"Triton {triton.__version__} is not supported; the kernels work with {works}: {wanted}, {fix}"
        )

"""What is said where torch.compile fails, in the words of the setting that wanted it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from grade.errors import GradeError, reason_of


def compiler_failure(setting: str, error: Exception) -> GradeError:
    """That torch.compile failed, why, and what to do."""
    return GradeError(
        f"{setting}: torch.compile failed ({reason_of(error)}). Mend what it names (it needs a C++ compiler and "
        f"Python's headers on a CPU, Triton on a GPU), or set {setting}=false."
    )


@contextmanager
def explained(setting: str) -> Iterator[None]:
    """Inside, a failure of torch.compile is a `compiler_failure`.

    Raises:
        GradeError: it failed.
    """
    try:
        yield
    except (torch._dynamo.exc.TorchDynamoException, torch._inductor.exc.InductorError) as error:
        raise compiler_failure(setting, error) from error


def without_fix(setting: str, error: GradeError) -> str:
    """Why something cannot be compiled, where a run goes on without."""
    return str(error).removeprefix(f"{setting}: ").split(" Set ")[0].split(" Mend ")[0]

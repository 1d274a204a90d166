"""The processes of a run: the machine as accelerate sees it, and errors that all of them share."""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list, gather_object

from grade.config import Config
from grade.errors import GradeError, NotFinite, RewardFailed


def make_accelerator(config: Config) -> Accelerator:
    """Accelerate's view of the machine: device, processes, reductions. Several leave their group when they end.

    Raises:
        GradeError: device=cuda without one, or train.deterministic where it is too late for it.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise GradeError("device=cuda, but torch sees no CUDA or ROCm device. Use device=auto or cpu.")
    if config.train.deterministic and config.device != "cpu" and torch.cuda.is_available():
        _fix_cublas()
    # Not what accelerate would choose on Apple silicon: its GPU has no float64, which sums here use.
    # The others wait for the main process while it trains a reward head, which may take longer than libraries allow.
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=24))
    accelerator = Accelerator(cpu=config.device == "cpu" or not torch.cuda.is_available(), kwargs_handlers=[patience])
    if accelerator.num_processes > 1:
        atexit.register(_leave)
    return accelerator


_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
_FIXED = (":4096:8", ":16:8")


def _fix_cublas() -> None:
    """Give cuBLAS workspaces that it does not divide anew: it reads of them with its first product.

    Raises:
        GradeError: that may have been already.
    """
    if os.environ.get(_CUBLAS) in _FIXED:
        return
    if torch.cuda.is_initialized():
        raise GradeError(
            f"train.deterministic is true, but this program has used the GPU before {_CUBLAS} was set. Set the "
            f"environment variable {_CUBLAS}={_FIXED[0]} before it starts."
        )
    os.environ[_CUBLAS] = _FIXED[0]


def _leave() -> None:
    """Join the threads of the processes' group. One that still runs when the interpreter is taken down ends the process
    with "terminate called without an active exception", though all its work is done.

    Only gloo's: NCCL's would first wait for the other processes, which may never come where this one ends by an error.
    """
    distributed = torch.distributed
    if distributed.is_initialized() and distributed.get_backend() == "gloo":
        distributed.destroy_process_group()


def shared(accelerator: Accelerator, value: Any) -> Any:
    """The main process' value, in every process."""
    return broadcast_object_list([value])[0] if accelerator.num_processes > 1 else value


def everywhere(accelerator: Accelerator, value: Any) -> list[Any]:
    """The value of every process, the main one's first."""
    return gather_object([value]) if accelerator.num_processes > 1 else [value]


def summed(accelerator: Accelerator, values: torch.Tensor) -> torch.Tensor:
    """The sum over processes, on CPU."""
    if accelerator.num_processes == 1:
        return values
    return accelerator.reduce(values.to(accelerator.device), reduction="sum").cpu()


@contextmanager
def failing_together(accelerator: Accelerator | None) -> Iterator[None]:
    """A reward that fails inside the block in one process fails in all of them behind it: the others would wait for it
    where they next need each other. Every process passes through as many of these blocks.

    Args:
        accelerator: None: there is one process.

    Raises:
        RewardFailed: in every process; where the reward has not failed itself, with the number of one where it has.
            NotFinite if that is all that has failed.
    """
    if accelerator is None or accelerator.num_processes == 1:
        yield
        return
    failed: RewardFailed | None = None
    try:
        yield
    except RewardFailed as error:
        failed = error
    if summed(accelerator, torch.tensor(float(failed is not None), dtype=torch.float64)) == 0:
        return
    said = everywhere(accelerator, None if failed is None else (str(failed), isinstance(failed, NotFinite)))
    number = next(number for number, words in enumerate(said) if words is not None)
    # Of one kind everywhere: a step that is left out for it is left out by all.
    kind = NotFinite if all(infinite for _, infinite in filter(None, said)) else RewardFailed
    if failed is not None:
        raise failed if type(failed) is kind else kind(str(failed)) from failed
    raise kind(f"in process {number} of {len(said)}: {said[number][0]}")


@contextmanager
def main_process_first(accelerator: Accelerator) -> Iterator[None]:
    """The block runs in the main process, then in the others; what the first may not do, the others do not try.

    Raises:
        GradeError: in every process, the main one's; accelerate's own would leave the others waiting for it.
    """
    if not accelerator.is_main_process:
        error = shared(accelerator, None)
        if error is not None:
            raise error
        yield
        return
    try:
        yield
    except GradeError as error:
        shared(accelerator, type(error)(str(error)))
        raise
    shared(accelerator, None)

"""The processes of a run: the machine as accelerate sees it, and errors that all of them share."""

from __future__ import annotations

import atexit
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list, gather_object

from grade.config import Config
from grade.errors import GradeError, NotFinite, RewardFailed
from grade.launch import check_launch
from grade.machine import is_out_of_memory
from grade.peers import Peers
from grade.terminal import warn_once
from grade_kernels.backend import backend_for
from grade_kernels.common.cpu_products import forced_library

_SEEN = 5.0
"""Seconds after which a process that has ended is surely seen to have (`grade.peers`)."""
_COLLECTIVE = re.compile(r"gloo|nccl|connection (closed|reset|refused)|broken pipe|process group", re.IGNORECASE)
"""In the errors of collectives whose other processes are gone; gloo's are of no class of their own."""


def make_accelerator(config: Config) -> Accelerator:
    """Accelerate's view of the machine: device, processes, reductions. Several leave their group when they end.

    Raises:
        GradeError: device=cuda without one, train.deterministic where it is too late for it, the launcher is set to
            what a run does not follow, or the kernels' environment variables to what cannot be done here.
    """
    check_launch(config.device)
    if config.device == "cuda" and not torch.cuda.is_available():
        raise GradeError("device=cuda, but torch sees no CUDA or ROCm device. Use device=auto or cpu.")
    if config.train.deterministic and config.device != "cpu" and torch.cuda.is_available():
        _fix_cublas()
    # Not what accelerate would choose on Apple silicon: its GPU has no float64, which sums here use.
    # Processes wait for each other as long as it takes: the main one trains a reward head, one asks a slow judge. That
    # one has ended is not seen by a timeout, but by `watching`.
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=24))
    accelerator = Accelerator(cpu=config.device == "cpu" or not torch.cuda.is_available(), kwargs_handlers=[patience])
    _check_kernels(accelerator.device, config.generation.top_k)
    if accelerator.num_processes > 1:
        atexit.register(_leave)
    return accelerator


def _check_kernels(device: torch.device, candidates: int) -> None:
    """Refuse what the kernels' environment variables demand and the device cannot do: a kernel would say so in the
    middle of the first pass.

    Raises:
        GradeError: naming the variable.
    """
    try:
        backend_for("the run", torch.empty(0, device=device), k=candidates)
        forced_library()
    except (RuntimeError, ValueError) as error:
        raise GradeError(f"The environment variable {error}.") from error


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


@contextmanager
def watching(accelerator: Accelerator) -> Iterator[None]:
    """While the block runs, a process that ends without the others ends them too: in words, and soon.

    Raises:
        GradeError: another process has ended, and a collective has failed of it. A process that waits on is ended where
            it is, with the same words and exit code 2.
    """
    if accelerator.num_processes == 1:
        yield
        return

    number, count = accelerator.process_index, accelerator.num_processes
    peers = Peers(number, count, partial(shared, accelerator), partial(any_process, accelerator))
    if not peers.watched:
        warn_once(
            "warning: the processes cannot connect to the main one on a port of its own, and so not see when one of "
            "them ends: the others may then wait for it."
        )
    well = False
    try:
        yield
        accelerator.wait_for_everyone()
        well = True
    except (RuntimeError, GradeError) as error:
        if not _of_collective(error) or not peers.noticed(_SEEN):
            raise
        raise GradeError(str(peers)) from error
    finally:
        peers.leave(well)


def _of_collective(error: BaseException | None) -> bool:
    """Whether it comes of a collective that has failed."""
    seen: set[int] = set()  # an error that is raised again may be among its own causes
    while error is not None and id(error) not in seen:
        if isinstance(error, RuntimeError) and is_out_of_memory(error):
            return False
        if isinstance(error, RuntimeError) and _COLLECTIVE.search(str(error)):
            return True
        seen.add(id(error))
        error = error.__cause__
    return False


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


def any_process(accelerator: Accelerator, wanted: bool) -> bool:
    """Whether any process wants something."""
    return bool(summed(accelerator, torch.tensor(float(wanted), dtype=torch.float64)) > 0)


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

"""What a launcher has set for the processes that it starts, and what of that a run does not follow."""

from __future__ import annotations

import os
from collections.abc import Mapping

from grade.errors import GradeError

_PLUGINS = {
    "ACCELERATE_USE_DEEPSPEED": ("DeepSpeed", "model.fsdp shards a base that one device cannot hold"),
    "ACCELERATE_USE_FSDP": ("its FSDP plugin", "model.fsdp shards the frozen base"),
    "ACCELERATE_USE_MEGATRON_LM": ("Megatron-LM", "model.fsdp shards a base that one device cannot hold"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": ("a parallelism_config", "model.fsdp shards the frozen base"),
}
"""By accelerate's variables: what is set, and what a run has for it."""


def check_launch(device: str, environment: Mapping[str, str] | None = None) -> None:
    """Refuse what accelerate's config file, or `accelerate launch`, asks for and a run would silently not do.

    Args:
        device: setting `device`.
        environment: None: this process'.

    Raises:
        GradeError: naming it, and the setting that does the same.
    """
    set_to = os.environ if environment is None else environment
    fix = "Leave it out of accelerate's config (`accelerate config`) or its options"
    for variable, (plugin, instead) in _PLUGINS.items():
        if _is_on(set_to.get(variable, "")):
            raise GradeError(f"accelerate is set to use {plugin}, which a run does not. {fix}: {instead}.")
    precision = set_to.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if precision not in ("no", ""):
        raise GradeError(
            f"accelerate's mixed_precision is {precision}, which a run does not follow. {fix}: model.dtype is that of "
            "the frozen weights, and adapters are float32."
        )
    backend = set_to.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if backend not in ("no", ""):
        raise GradeError(
            f"accelerate's dynamo_backend is {backend}, which a run does not follow. {fix}: rollout.compile compiles "
            "the decoding step, and train.compile the layers of the other passes."
        )
    steps = set_to.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if steps not in ("1", "auto", ""):
        raise GradeError(
            f"accelerate's gradient_accumulation_steps is {steps}, which a run does not follow. {fix}: "
            "train.accumulation_steps is the setting."
        )
    if device == "cuda" and _is_on(set_to.get("ACCELERATE_USE_CPU", "")):
        raise GradeError("device=cuda, but accelerate is set to use the CPU. Change one of them.")
    if "ACCELERATE_MIXED_PRECISION" in set_to and "MASTER_PORT" in set_to and "RANK" not in set_to and not _mpi(set_to):
        raise GradeError(
            "`accelerate launch` was asked for several processes on a CPU, and starts one without mpirun. Use torchrun "
            "(--nproc_per_node 2 -m grade ...), or `accelerate launch --multi_gpu`, which does the same, with --device "
            "cpu."
        )


def processes_of(environment: Mapping[str, str] | None = None) -> tuple[int, int]:
    """(number of this process, how many there are), as launchers tell; (0, 1) without one."""
    found = os.environ if environment is None else environment
    try:
        return int(found.get("RANK", "0")), int(found.get("WORLD_SIZE", "1"))
    except ValueError:
        return 0, 1


def _mpi(environment: Mapping[str, str]) -> bool:
    return any(
        name in environment for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "WORLD_SIZE")
    )


def _is_on(value: str) -> bool:
    return value.lower() in ("1", "true", "yes", "on", "y", "t")

"""Continue a run from its last whole checkpoint: what must still be the same, and what is put back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from grade.config import TrainConfig
from grade.errors import GradeError, reason_of
from grade.methods.base import Method
from grade.model.checkpoint import load_adapter
from grade.model.fingerprint import changed_inputs, read_record
from grade.model.policy import Policy
from grade.training.resumable import Resumable, resumable
from grade_kernels.common import cpu_products


def check_inputs(run_dir: Path, inputs: Mapping[str, Any]) -> None:
    """Refuse to go on with something else, as `restored` does, before any work; by the run's record, if it has one.

    Raises:
        GradeError: with what differs.
    """
    if (run_dir / "run.json").is_file():
        _refuse_others(run_dir, read_record(run_dir)["inputs"], inputs)


def _refuse_others(run_dir: Path, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    changed = changed_inputs(then, now)
    if changed and [name for name in now if then.get(name) != now[name]] == ["responses_per_step"]:
        raise GradeError(
            f"train.resume: {run_dir} was started with something else: {changed} With another number of processes, set "
            f"train.batch_size * train.accumulation_steps * processes to {then['responses_per_step']} again."
        )
    if changed:
        raise GradeError(
            f"train.resume: {run_dir} was started with something else: {changed} Put it back, or start another run "
            "with train.run_dir."
        )


def restored(
    run_dir: Path, inputs: Mapping[str, Any], policy: Policy, optimizer: torch.optim.Optimizer, method: Method
) -> Resumable:
    """Put the adapter, optimizer and method of the newest whole checkpoint back; the rest of the trainer's state is in
    what is returned.

    Args:
        inputs: fingerprint of what the run reads now (`grade.model.fingerprint`).

    Raises:
        GradeError: all checkpoints are damaged, or something that the run depends on has been replaced.
    """
    found = resumable(run_dir)
    put_back(found.folder, found.state, run_dir, inputs, policy, optimizer, method)
    return found


def put_back(
    folder: Path,
    state: dict[str, Any],
    run_dir: Path,
    inputs: Mapping[str, Any],
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    method: Method,
) -> None:
    """The same of any checkpoint with a state.

    Args:
        state: what `grade.model.checkpoint.load_state` reads in its folder; the optimizer's part of it is taken out.
    """
    try:
        _refuse_others(run_dir, state["inputs"], inputs)
        load_adapter(folder, policy)
        _put_optimizer(optimizer, state.pop("optimizer"))  # as large as the weights, and nobody's from here on
        method.load_state_dict(state["method"])
        method.kl_coef = state.get("kl_coef", method.kl_coef)  # checkpoints of earlier versions have none
        method.reward.load_state_dict(state.get("reward", {}))  # checkpoints of earlier versions have none
        if "cpu_products" in state:
            cpu_products.restore(state["cpu_products"])
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise GradeError(
            f"train.resume: the trainer's state in {folder} does not fit this run ({reason_of(error)}). Start again "
            "with --train.overwrite true."
        ) from error


def _put_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Put a state back, whose tensors have the shapes of their parameters and whose settings are of the same kinds:
    torch compares no more than the numbers of both, and the next step would fail.

    Raises:
        KeyError, TypeError, ValueError: it is another optimizer's.
    """
    settings = [{name: type(value) for name, value in group.items()} for group in optimizer.param_groups]
    optimizer.load_state_dict(dict(state))
    for group, before in zip(optimizer.param_groups, settings, strict=True):
        wrong = [name for name, kind in before.items() if not isinstance(group[name], _alike(kind))]
        if wrong:
            raise ValueError(f"{wrong[0]} of the optimizer is {group[wrong[0]]!r}")
        for parameter in group["params"]:
            for name, value in optimizer.state.get(parameter, {}).items():
                fits = isinstance(value, torch.Tensor) and value.shape in (parameter.shape, torch.Size())
                if not fits or (name == "step") != (value.dim() == 0):
                    raise ValueError(f"{name} of the optimizer is not that of a parameter of {tuple(parameter.shape)}")


def _alike(kind: type) -> tuple[type, ...]:
    """What a setting may be: a learning rate of 0 is whole where another one is not."""
    return (int, float) if kind in (int, float) else (kind,)


def other_schedule(steps_before: int, train: TrainConfig, step: int) -> list[str]:
    """What to say where a run goes on to another last step than before, and its learning rate depends on it."""
    if steps_before == train.steps or train.schedule == "constant":
        return []
    return [
        f"train.steps was {steps_before} and is {train.steps}: from here on the learning rate follows the "
        f"{train.schedule} schedule of {train.steps} steps, which the first {step} did not"
    ]

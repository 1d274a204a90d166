"""Continue a run from its last whole checkpoint: what must still be the same, and what is put back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from grade.config import TrainConfig
from grade.errors import GradeError, read_json, reason_of
from grade.methods.base import Method
from grade.model.checkpoint import load_adapter
from grade.model.fingerprint import changed_inputs
from grade.model.policy import Policy
from grade.training.resumable import Resumable, resumable

_FIELDS = ("optimizer", "method", "best", "evaluations", "steps", "inputs", "logs")


def check_inputs(run_dir: Path, inputs: Mapping[str, Any]) -> None:
    """Refuse to go on with something else, as `restored` does, before any work; by the run's record, if it has one.

    Raises:
        GradeError: with what differs.
    """
    record = run_dir / "run.json"
    if record.is_file():
        before = read_json(record, f"Delete {record} to go without this check.", "inputs")
        _refuse_others(run_dir, before["inputs"], inputs)


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
    folder, state = found.folder, found.state
    missing = [name for name in _FIELDS if name not in state]
    try:
        if missing:
            raise KeyError(missing[0])
        _refuse_others(run_dir, state["inputs"], inputs)
        load_adapter(folder, policy)
        optimizer.load_state_dict(state.pop("optimizer"))  # as large as the weights, and nobody's from here on
        method.load_state_dict(state["method"])
        method.kl_coef = state.get("kl_coef", method.kl_coef)  # checkpoints of earlier versions have none
        method.reward.load_state_dict(state.get("reward", {}))  # checkpoints of earlier versions have none
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise GradeError(
            f"train.resume: the trainer's state in {folder} does not fit this run ({reason_of(error)}). Start again "
            "with --train.overwrite true."
        ) from error
    return found


def other_schedule(steps_before: int, train: TrainConfig, step: int) -> list[str]:
    """What to say where a run goes on to another last step than before, and its learning rate depends on it."""
    if steps_before == train.steps or train.schedule == "constant":
        return []
    return [
        f"train.steps was {steps_before} and is {train.steps}: from here on the learning rate follows the "
        f"{train.schedule} schedule of {train.steps} steps, which the first {step} did not"
    ]

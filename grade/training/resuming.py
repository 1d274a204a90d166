"""Continue a run from its last checkpoint: what must still be the same, and what is put back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from grade.config import TrainConfig
from grade.errors import GradeError, reason_of
from grade.files import latest
from grade.formats import LOGGED_HERE
from grade.jsonl import rows_of
from grade.methods.base import Method
from grade.model.checkpoint import load_adapter, load_state, verified_step
from grade.model.fingerprint import changed_inputs, read_record
from grade.model.policy import Policy
from grade.shapes import misfit
from grade.training.log import beginning


def check_inputs(run_dir: Path, inputs: Mapping[str, Any]) -> None:
    """Refuse to go on with something else, as `restored` does, before any work; by the run's record, if it has one.

    Raises:
        GradeError: with what differs.
    """
    if (run_dir / "run.json").is_file():
        _refuse_others(run_dir, read_record(run_dir)["inputs"], inputs)


def _refuse_others(run_dir: Path, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    changed = changed_inputs(then, now)
    if changed:
        raise GradeError(
            f"train.resume: {run_dir} was started with something else: {changed} Put it back, or start another run "
            "with train.run_dir."
        )


def restored(
    run_dir: Path, inputs: Mapping[str, Any], policy: Policy, optimizer: torch.optim.Optimizer, method: Method
) -> dict[str, Any]:
    """Put the last checkpoint's adapter, optimizer and method back; the rest of the trainer's state is returned.

    Args:
        inputs: fingerprint of what the run reads now (`grade.model.fingerprint`).

    Raises:
        GradeError: the checkpoint is damaged, or something that the run depends on has been replaced.
    """
    folder = latest(run_dir / "checkpoints" / "last")
    state = load_state(folder)
    try:
        _refuse_others(run_dir, state["inputs"], inputs)
        load_adapter(folder, policy)
        _put_optimizer(optimizer, state["optimizer"])
        method.load_state_dict(state["method"])
        method.kl_coef = state.get("kl_coef", method.kl_coef)  # checkpoints of earlier versions have none
        method.reward.load_state_dict(state.get("reward", {}))  # checkpoints of earlier versions have none
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise GradeError(
            f"train.resume: the trainer's state in {folder} does not fit this run ({reason_of(error)}). Start again "
            "with --train.overwrite true."
        ) from error
    check_story(state, run_dir)
    return state


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


def check_story(state: Mapping[str, Any], run_dir: Path) -> None:
    """Refuse a state whose parts are of different moments: its step, its validations and its best one, and the log of
    its steps must fit each other.

    Args:
        state: as `load_state` gives it.

    Raises:
        GradeError: with what does not fit.
    """
    step, best = state["step"], state["best"]
    validated = [row["step"] for row in state["evaluations"]]
    wrong = None
    if validated != sorted(set(validated)) or validated[:1] not in ([], [0]):
        wrong = f"its validations are those after {', '.join(map(str, validated))} steps"
    elif validated and validated[-1] > step:
        wrong = f"a validation is of step {validated[-1]}"
    elif best is not None and best["step"] not in validated:
        wrong = f"its best is step {best['step']}, which was not validated"
    elif state["steps"] < step:
        wrong = f"it was to have {state['steps']} steps"
    else:
        kept = beginning(run_dir / "metrics.jsonl", state["logs"]["metrics.jsonl"])
        rows = rows_of(kept).rows
        wrong = next((f"of metrics.jsonl {one}" for row in rows if (one := misfit(row, LOGGED_HERE)) is not None), None)
        trained = [row.get("step") for row in rows if "validation/reward" not in row]
        if wrong is None and trained != list(range(step)):
            wrong = f"metrics.jsonl has {len(trained)} steps"
    if wrong is not None:
        raise GradeError(
            f"train.resume: {run_dir}/checkpoints/last is of step {step}, and {wrong}. Put back what belongs to it, or "
            "start again with --train.overwrite true."
        )


def other_schedule(steps_before: int, train: TrainConfig, step: int) -> list[str]:
    """What to say where a run goes on to another last step than before, and its learning rate depends on it."""
    if steps_before == train.steps or train.schedule == "constant":
        return []
    return [
        f"train.steps was {steps_before} and is {train.steps}: from here on the learning rate follows the "
        f"{train.schedule} schedule of {train.steps} steps, which the first {step} did not"
    ]


def best_is_missing(run_dir: Path, best: Mapping[str, Any] | None, step: int) -> bool:
    """Whether a run was stopped after it had noted that the policy it goes on with is its best, and before that was
    saved as such.

    Args:
        best: what the state says of the best validation.
        step: of the policy that the run goes on with.

    Raises:
        GradeError: the best checkpoint is damaged, missing or another one, and is no longer at hand.
    """
    if best is None:
        return False
    folder, at_hand = latest(run_dir / "checkpoints" / "best"), best["step"] == step
    try:
        found = verified_step(folder)
        wrong = None if found == best["step"] else f"{folder} holds step {found}, but the best is step {best['step']}."
    except GradeError as error:
        wrong = str(error)
    if wrong is not None and not at_hand:
        raise GradeError(f"train.resume: {wrong} Put it back, or start again with --train.overwrite true.")
    return wrong is not None

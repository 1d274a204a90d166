"""Adapters and trainer state on disk, always whole: written beside their place, then moved into it."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from pathlib import Path
from typing import Optional

import torch
from safetensors import SafetensorError

from grade.errors import GradeError, first_line
from grade.model import Policy

STATE_FILE = "trainer_state.pt"


def save_checkpoint(directory: Path, policy: Policy, state: Optional[dict] = None) -> None:
    """Write the adapter as peft does (`PeftModel.from_pretrained` loads it) and, for resuming, the trainer's state.

    An interruption leaves the earlier checkpoint or the new one, never half of either.
    """
    fresh, old = directory.with_name(directory.name + ".new"), directory.with_name(directory.name + ".old")
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        policy.model.save_pretrained(str(fresh))
        if state is not None:
            torch.save(state, fresh / STATE_FILE)
        if directory.exists():
            directory.rename(old)
        fresh.rename(directory)
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(fresh, ignore_errors=True)
        raise GradeError(
            f"train.run_dir: the checkpoint {directory} could not be written ({error}). What was saved before "
            "is whole; make room and continue with --train.resume true."
        ) from error
    shutil.rmtree(old, ignore_errors=True)


def check_writable(setting: str, folder: Path) -> None:
    """Find out before any work whether `folder` can be made and written; leaves no trace in it.

    Raises:
        GradeError: naming the setting.
    """
    try:
        missing = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        if missing:
            folder.rmdir()
    except OSError as error:
        raise GradeError(
            f"{setting}: {folder} cannot be written ({error.strerror or error}). Name another folder."
        ) from error


def load_adapter(directory: Path, policy: Policy) -> None:
    """Put a saved adapter's weights into the policy.

    Raises:
        GradeError: the folder holds no adapter, or one of another shape.
    """
    from peft import LoraConfig, load_peft_weights, set_peft_model_state_dict

    if not (directory / "adapter_config.json").is_file():
        raise GradeError(f"checkpoint {directory}: no adapter is saved there (adapter_config.json is missing).")
    try:
        saved, ours = LoraConfig.from_pretrained(str(directory)), policy.model.peft_config["default"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise GradeError(f"checkpoint {directory}: adapter_config.json is damaged ({first_line(error)}).") from error
    for name in ("r", "lora_alpha", "use_rslora"):
        if getattr(saved, name) != getattr(ours, name):
            raise GradeError(
                f"checkpoint {directory} was trained with {name}={getattr(saved, name)}, model.lora gives "
                f"{getattr(ours, name)}: its weights would mean something else. Use the config the run was made with."
            )
    try:
        weights = load_peft_weights(str(directory), device=str(policy.device))
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise GradeError(f"checkpoint {directory}: its adapter cannot be read ({first_line(error)}).") from error
    try:
        outcome = set_peft_model_state_dict(policy.model, weights)
    except RuntimeError as error:
        reason = first_line(error)
        raise GradeError(f"checkpoint {directory} does not fit model.name and model.lora: {reason}") from error
    expected = {name for name, p in policy.model.named_parameters() if p.requires_grad}
    missing = [name for name in outcome.missing_keys if name in expected]
    if missing or outcome.unexpected_keys:
        raise GradeError(
            f"checkpoint {directory} does not fit model.lora: {len(missing)} adapter tensors are missing from it and "
            f"{len(outcome.unexpected_keys)} have no place here. Use the config the run was made with."
        )


def adapter_digest(directory: Path) -> Optional[str]:
    """SHA-256 of a saved adapter's weights, which a folder's name does not tell. None if there are none."""
    weights = directory / "adapter_model.safetensors"
    return hashlib.sha256(weights.read_bytes()).hexdigest() if weights.is_file() else None


def load_state(directory: Path) -> dict:
    """The trainer's state saved with a checkpoint.

    Raises:
        GradeError: there is none.
    """
    path = latest(directory) / STATE_FILE
    if not path.is_file():
        raise GradeError(f"train.resume: {directory} holds no checkpoint to continue from. Start without it.")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what a damaged pickle raises depends on the damage
        raise GradeError(
            f"train.resume: {path} cannot be read ({first_line(error)}). Start again with --train.overwrite true."
        ) from error


def latest(directory: Path) -> Path:
    """`directory`, or the copy that an interruption between two renames left in its place."""
    old = directory.with_name(directory.name + ".old")
    return old if not directory.exists() and old.exists() else directory

"""What a run has trained, for use: which checkpoint, on the base that it was made from."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from grade.config import Config
from grade.config.sealed import config_from_sealed
from grade.errors import GradeError, read_json
from grade.files import latest
from grade.formats import EVALUATIONS, RECORD
from grade.model.checkpoint import holds_weights, load_adapter, verified_step
from grade.model.fingerprint import check_made_from, policy_inputs, refuse_given
from grade.model.loading import load_policy, load_tokenizer
from grade.model.policy import Policy
from grade.shapes import Shape
from grade.tasks.encoding import encode
from grade.training.card import model_card
from grade.training.run_folder import CHECKPOINT


def checkpoint_folder(run_dir: Path, checkpoint: str) -> Path:
    """The folder that `--checkpoint` names.

    Args:
        checkpoint: "best", "last", "step-N" or "resume-N" of the run, or a folder.

    Raises:
        GradeError: no adapter is saved there.
    """
    own = re.fullmatch(CHECKPOINT, checkpoint) is not None
    folder = latest(run_dir / "checkpoints" / checkpoint) if own else Path(checkpoint)
    if not holds_weights(folder):
        there = sorted(path.name for path in run_dir.glob("checkpoints/*") if holds_weights(path))
        known = f"{run_dir} has {', '.join(there)}" if there else f"{run_dir} has no checkpoint yet"
        raise GradeError(
            f"--checkpoint {checkpoint}: {folder} holds no adapter (adapter_config.json is missing); {known}."
        )
    return folder


def load_trained(config: Config, run_dir: Path, folder: Path, device: torch.device) -> Policy:
    """The policy with the adapter of a checkpoint; neither data nor reward is read.

    Args:
        config: the run's, with overrides.
        folder: of the checkpoint.

    Raises:
        GradeError: the base is not the one that the run was made from, or something cannot be loaded.
    """
    refuse_given(run_dir)
    policy = load_policy(config, load_tokenizer(config.model), device)
    check_made_from(run_dir, policy_inputs(policy))
    load_adapter(folder, policy)
    return policy


def card_of(run_dir: Path, folder: Path, *, merged: bool) -> str:
    """The model card of a run's checkpoint, made anew from the run's files: its own settings, without overrides.

    Raises:
        GradeError: one of them, or the checkpoint, is damaged.
    """
    config = config_from_sealed(run_dir / "config.yaml")
    step = verified_step(folder)
    record, found = _read(run_dir / "run.json", RECORD), _read(run_dir / "evaluation.json", EVALUATIONS)
    tested = found.get("test") if (found.get("best") or {}).get("step") == step else None
    validation = [row for row in found.get("validation", []) if row["step"] <= step]
    return model_card(config, record, step, validation, tested, merged=merged)


def sampled_prompts(run_dir: Path, tokenizer: Any, count: int = 4) -> list[list[int]]:
    """Token ids of texts to compare models on: the first prompts that the run validated with, and the base model's
    responses; some ids of the vocabulary where no texts were kept."""
    rows = _read(run_dir / "evaluation.json", EVALUATIONS).get("validation") or [{}]
    samples = rows[0].get("samples", [])[:count]
    texts = [sample.get("prompt", "") + sample.get("response", "") for sample in samples]
    ids = [row for row in encode(tokenizer, texts, None) if row]
    return ids or [sorted(tokenizer.get_vocab().values())[: 4 * count]]


def _read(path: Path, shape: Shape) -> dict:
    return read_json(path, "Put it back.", shape=shape) if path.is_file() else {}

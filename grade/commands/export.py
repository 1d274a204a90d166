"""`grade export`: a run's policy as a folder for other programs."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from grade.config import Config
from grade.config.sealed import config_from_sealed
from grade.errors import GradeError
from grade.model.checkpoint import MANIFEST_FILE
from grade.processes import make_accelerator
from grade.training.export import Merged, check_target, export_adapter, export_merged
from grade.training.trained import card_of, checkpoint_folder, load_trained, sampled_prompts


def export_run(config: Config, run_dir: Path, checkpoint: str, merged: bool, target: Path | None) -> Path:
    """`grade export`: write the folder, and say what it is.

    Args:
        config: the run's, with overrides.
        checkpoint: "best", "last", "step-N", or the folder of a checkpoint in the run's folder.
        merged: a whole model instead of an adapter.
        target: missing or empty; None: one in the run's folder.

    Returns:
        The folder.
    """
    folder = exported_checkpoint(run_dir, checkpoint)
    target = target or run_dir / "export" / f"{folder.name.removesuffix('.old')}{'-merged' if merged else ''}"
    check_target(target)
    done = write_export(config, run_dir, folder, merged, target)
    made = config_from_sealed(run_dir / "config.yaml")
    lines = [*described(done, made), f"Folder: {target}"]
    Console().print("\n".join(lines), soft_wrap=True, highlight=False, markup=False)
    return target


def exported_checkpoint(run_dir: Path, checkpoint: str) -> Path:
    """The folder of a checkpoint that a run wrote.

    Raises:
        GradeError: there is none, or it is an adapter of something else.
    """
    folder = checkpoint_folder(run_dir, checkpoint)
    # The folder of checkpoints may be a link to another disk.
    if not any(folder.resolve().is_relative_to(place.resolve()) for place in (run_dir, run_dir / "checkpoints")):
        raise GradeError(
            f"--checkpoint {checkpoint}: {folder} does not lie in {run_dir}, and the card of that run would not be its "
            "own. Name the run that it is of, or one of this run's: best, last or step-N."
        )
    if not (folder / MANIFEST_FILE).is_file():
        raise GradeError(
            f"--checkpoint {checkpoint}: {folder} is no checkpoint of a run ({MANIFEST_FILE} is missing), and its card "
            "would say what is not so. Name best, last, or a folder that a run wrote."
        )
    return folder


def write_export(config: Config, run_dir: Path, folder: Path, merged: bool, target: Path) -> Merged | None:
    """Write a checkpoint as an adapter or, which is compared with what is in memory, as a whole model."""
    if not merged:
        export_adapter(folder, target)
        return None
    card = card_of(run_dir, folder, merged=True)
    device = make_accelerator(config).device
    return export_merged(
        lambda: load_trained(config, run_dir, folder, device),
        target,
        lambda tokenizer: sampled_prompts(run_dir, tokenizer),
        card,
    )


def described(done: Merged | None, made: Config) -> list[str]:
    """What an export is, in lines for the terminal.

    Args:
        made: the run's own settings, without overrides.
    """
    if done is None and made.model.finetuning == "full":
        return ["A whole model, its tokenizer and its card; AutoModelForCausalLM loads it."]
    if done is None:
        return ["An adapter, its tokenizer and its card; AutoPeftModelForCausalLM loads it."]
    lines = [
        f"Loaded again: the logits of {len(done.logits)} texts are, to the bit, those of the merged weights.",
        f"Largest difference of a logit: {done.from_adapter:.3g} between adapter and merged weights, "
        f"{done.of_training:.3g} between base model and adapter.",
    ]
    if done.from_adapter > 0.1 * done.of_training:
        lines.append(
            "warning: rounding the merged weights has lost a part of what training changed. Export without --merge, or "
            "merge in float32 (--model.dtype float32)."
        )
    return lines

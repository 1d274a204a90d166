"""The folder of a run: whose it is, what it may be used for, and what lies where in it.

A run's folder has a marker of its own, which is locked while a process uses the run. Only what a run writes is ever
deleted, only where the marker stands, and never through a symbolic link.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

from grade.config import Config, flatten
from grade.config.methods import DIFFERENTIATING
from grade.config.reading import config_from_yaml
from grade.errors import GradeError, read_json, writing
from grade.files import check_writable, latest, locked
from grade.model.checkpoint import load_state

MARKER = ".grade-run"
_MARKER_TEXT = (
    "A run of `grade train` is kept in this folder. --train.overwrite true deletes what the run wrote, and nothing "
    "else.\n"
)
_WRITTEN = {  # by folder, names of what a run writes
    "": r"(config\.yaml|metrics\.jsonl|samples\.jsonl|run\.json|evaluation(-[\w.-]+)?\.json)(\.new)?|reward\.(new|old)",
    "checkpoints": r"(best|last|step-\d+)(\.new|\.old|\.deleted)?",
    "reward": r"(head\.safetensors|reward\.json)",
    "tensorboard": r"events\.out\.tfevents\..*",
}

_MAY_CHANGE_ON_RESUME = {
    "train.resume", "train.overwrite", "train.run_dir", "output_dir", "name", "train.steps", "train.save_every",
    "train.tensorboard", "train.wandb", "train.wandb_project", "train.samples_logged", "train.samples_every",
    "evaluation.samples", "evaluation.batch_size", "generation.batch_size", "method.head_chunk_mib",
    "train.keep_adapters", "task.judge_examples", "method.activation_checkpointing", "rollout.compile",
}
_MICRO_BATCHES = {"train.batch_size", "train.accumulation_steps"}


def adapter_folder(run_dir: Path, step: int) -> Path:
    """Where `train.keep_adapters` keeps the adapter that was validated after `step` optimizer steps."""
    return run_dir / "checkpoints" / f"step-{step}"


def make_again(run_dir: Path) -> str:
    """What to do about a run whose files are damaged, as a sentence."""
    return f"Delete {run_dir}: the same command makes that run again."


def is_ours(run_dir: Path) -> bool:
    """Whether the marker of a run stands in a folder."""
    return (run_dir / MARKER).is_file()


def mark(run_dir: Path) -> None:
    """Make the folder if it is missing, and put the marker there.

    Raises:
        GradeError: it cannot be written.
    """
    with writing(run_dir, "train.run_dir"):
        run_dir.mkdir(parents=True, exist_ok=True)
        if not (run_dir / MARKER).is_file() or (run_dir / MARKER).stat().st_size == 0:
            (run_dir / MARKER).write_text(_MARKER_TEXT, encoding="utf-8")


@contextmanager
def run_folder(config: Config) -> Iterator[Config]:
    """Hold a run's folder while the block runs: no other process may use it, and it is fit for what is asked.

    Yields:
        The config with `train.resume` and `train.overwrite` decided where resume was `auto`.

    Raises:
        GradeError: another process uses it, or `prepare_run_dir` refuses it. A folder that was made here and holds
            nothing yet is gone again after an error.
    """
    run_dir = Path(config.run_dir)
    prepare_run_dir(decided(config))  # first without a trace: what is refused is not marked
    missing = not run_dir.exists()
    with writing(run_dir, "train.run_dir"):
        run_dir.mkdir(parents=True, exist_ok=True)
    in_use = f"train.run_dir: another process uses {run_dir}. Wait for it, or name another folder with --train.run_dir."
    with locked(run_dir / MARKER, "train.run_dir", in_use):
        try:
            config = decided(config)  # what another process did here in between counts
            prepare_run_dir(config)
            mark(run_dir)
            yield config
        finally:
            if not _content(run_dir):  # the lock is ours, so nobody else is about to write here
                (run_dir / MARKER).unlink(missing_ok=True)
                if missing:
                    run_dir.rmdir()


def decided(config: Config) -> Config:
    """`train.resume: auto` as what it means for the folder as it is: continue a checkpoint, or start, over what a run
    left that was stopped before its first checkpoint."""
    if config.train.resume != "auto":
        return config
    run_dir = Path(config.run_dir)
    resume = latest(run_dir / "checkpoints" / "last").is_dir()
    over = not resume and is_ours(run_dir) and bool(_content(run_dir))
    return replace(config, train=replace(config.train, resume=resume, overwrite=over))


def prepare_run_dir(config: Config) -> Path:
    """The run's folder: free, or holding a run to resume or to overwrite (which `fit` deletes, once all is loaded).

    Raises:
        GradeError: it holds another run's files, or nothing to resume, or cannot be written.
    """
    run_dir = Path(config.run_dir)
    if config.train.resume:
        _check_resumable(config, run_dir)
    elif run_dir.exists() and (not run_dir.is_dir() or _content(run_dir)):
        _check_replaceable(config, run_dir)
    check_writable("train.run_dir", run_dir)
    return run_dir


def _check_resumable(config: Config, run_dir: Path) -> None:
    done = load_state(run_dir / "checkpoints" / "last")["step"]
    differing = differing_settings(config_from_yaml(run_dir / "config.yaml"), config)
    if differing:
        raise GradeError(
            f"train.resume: {run_dir} was started with other settings: {differing}. Put them back, or start "
            "another run with --train.run_dir."
        )
    if done > config.train.steps or (done == config.train.steps and is_finished(config)):
        raise GradeError(
            f"train.resume: {run_dir} has had {done} steps, train.steps is {config.train.steps}: there is nothing "
            "left to do. Raise train.steps to go on, or look at it with `grade evaluate`."
        )


def _check_replaceable(config: Config, run_dir: Path) -> None:
    elsewhere = "name another folder with --train.run_dir or --name"
    if not run_dir.is_dir():
        raise GradeError(f"train.run_dir: {run_dir} is a file: {elsewhere}.")
    if not is_ours(run_dir):
        what = "so nothing is deleted there" if config.train.overwrite else "and it is not empty"
        raise GradeError(
            f"train.run_dir: {run_dir} is no folder of a run ({MARKER} is missing), {what}: {elsewhere}."
        )
    if config.train.overwrite:
        link = next((path for path in (run_dir, *_written(run_dir)) if path.is_symlink()), None)
        if link is not None:
            raise GradeError(
                f"train.overwrite: {link} is a symbolic link, and nothing is deleted through one. Remove the link "
                f"yourself, or {elsewhere}."
            )
        return
    if latest(run_dir / "checkpoints" / "last").is_dir():
        raise GradeError(
            f"train.run_dir: {run_dir} already holds a run. Continue it with --train.resume true, replace it with "
            f"--train.overwrite true, or {elsewhere}."
        )
    raise GradeError(
        f"train.run_dir: {run_dir} holds a run that was stopped before its first checkpoint. Start it again with "
        f"--train.resume auto, or {elsewhere}."
    )


def _content(run_dir: Path) -> list[Path]:
    """What a folder holds beside the marker."""
    return [path for path in run_dir.iterdir() if path.name != MARKER]


def _written(run_dir: Path) -> list[Path]:
    """Files and folders that a run has written, in the order in which they may go.

    First the record, by which a comparison counts a run; then what could be resumed from, the older before the newer;
    last the folders that held it.
    """
    found = [run_dir / "run.json", run_dir / "checkpoints" / "last.old", run_dir / "checkpoints" / "last"]
    found = [path for path in found if os.path.lexists(path)]
    for folder in ("checkpoints", "reward", "tensorboard", ""):
        place = run_dir / folder
        if place.is_dir() and not place.is_symlink():
            written = [path for path in sorted(place.iterdir()) if re.fullmatch(_WRITTEN[folder], path.name)]
            found += [path for path in written if path not in found]
    return found + [run_dir / folder for folder in _WRITTEN if folder and (run_dir / folder).exists()]


def clear(run_dir: Path) -> None:
    """Delete what a run has written, and leave what anybody else put there.

    A checkpoint is renamed before it is deleted: half of one never stands under its name.

    Raises:
        GradeError: something cannot be deleted.
    """
    with writing(run_dir, "train.overwrite", f"Delete {run_dir} yourself, or name another folder."):
        holding = [run_dir / folder for folder in _WRITTEN if folder]
        for path in _written(run_dir):
            if path.is_symlink() or not path.exists():
                continue  # a link is refused by `prepare_run_dir`, unless it was made since then
            if path.parent == run_dir / "checkpoints" and path.suffix in ("", ".old"):
                gone = path.with_name(path.stem + ".deleted")  # a checkpoint is whole while it has its name
                shutil.rmtree(gone, ignore_errors=True)
                path = path.rename(gone)
            if path.is_file():
                path.unlink()
            elif path not in holding:
                shutil.rmtree(path)
            elif not any(path.iterdir()):  # unless somebody else put something there
                path.rmdir()


def differing_settings(before: Config, now: Config) -> str:
    """The settings in which a run would be another one, as words; empty if there are none."""
    old, new = flatten(asdict(before)), flatten(asdict(now))
    free = _MAY_CHANGE_ON_RESUME | {name for name in new if name.startswith(("compare.", "variance."))}
    if now.method.name not in DIFFERENTIATING:
        free -= {"generation.batch_size"}  # what is decoded together decides which responses share a mini-batch
    elif not now.method.replay_dropout:
        free |= _MICRO_BATCHES  # the responses of a whole step must stay, which the checkpoint's inputs tell
    names = [name for name in new if old[name] != new[name] and name not in free]
    return ", ".join(f"{name} ({old[name]} then, {new[name]} now)" for name in names)


def is_finished(config: Config) -> bool:
    """Whether the run in train.run_dir has had all its steps, their validations and, if there is one, its test.

    Raises:
        GradeError: its evaluation.json is damaged.
    """
    path = Path(config.run_dir) / "evaluation.json"
    if not path.is_file():
        return False
    done = read_json(path, make_again(path.parent), "validation")
    validated = done["validation"][-1]["step"] if done["validation"] else 0
    return validated >= config.train.steps and ("test" in done or config.evaluation.test_prompts == 0)

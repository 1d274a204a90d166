"""The folder of a run: free, or holding a run to resume or to overwrite, and what lies where in it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from grade.checkpoint import check_writable, load_state
from grade.config import Config, GradeError, flatten
from grade.config_io import config_from_yaml
from grade.errors import read_json
from grade.method_config import DIFFERENTIATING

_MAY_CHANGE_ON_RESUME = {
    "train.resume", "train.overwrite", "train.run_dir", "output_dir", "name", "train.steps", "train.save_every",
    "train.tensorboard", "train.wandb", "train.wandb_project", "train.samples_logged", "train.samples_every",
    "evaluation.samples", "evaluation.batch_size", "generation.batch_size", "method.head_chunk_mib",
    "train.keep_adapters", "task.judge_examples", "method.activation_checkpointing", "rollout.compile",
}


def adapter_folder(run_dir: Path, step: int) -> Path:
    """Where `train.keep_adapters` keeps the adapter that was validated after `step` optimizer steps."""
    return run_dir / "checkpoints" / f"step-{step}"


def make_again(run_dir: Path) -> str:
    """What to do about a run whose files are damaged, as a sentence."""
    return f"Delete {run_dir}: the same command makes that run again."


def prepare_run_dir(config: Config) -> Path:
    """The run's folder: free, or holding a run to resume or to overwrite (which `fit` deletes, once all is loaded).

    Raises:
        GradeError: it holds another run's files, or nothing to resume, or cannot be written.
    """
    run_dir = Path(config.run_dir)
    if config.train.resume:
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
    elif run_dir.exists() and (not run_dir.is_dir() or any(run_dir.iterdir())):
        if not config.train.overwrite:
            raise GradeError(
                f"train.run_dir: {run_dir} already holds a run. Continue it with --train.resume true, replace it with "
                "--train.overwrite true, or name another folder with --train.run_dir or --name."
            )
        if not (run_dir / "config.yaml").is_file():
            raise GradeError(f"train.overwrite: {run_dir} does not look like a run (no config.yaml): not deleted.")
    check_writable("train.run_dir", run_dir)
    return run_dir


def differing_settings(before: Config, now: Config) -> str:
    """The settings in which a run would be another one, as words; empty if there are none."""
    old, new = flatten(asdict(before)), flatten(asdict(now))
    free = _MAY_CHANGE_ON_RESUME | {name for name in new if name.startswith(("compare.", "variance."))}
    if now.method.name not in DIFFERENTIATING:
        free -= {"generation.batch_size"}  # what is decoded together decides which responses share a mini-batch
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

"""The folder of a run: whose it is, what it may be used for, and what lies where in it.

A run's folder has a marker of its own, which is locked while a process uses the run. Only what a run writes is ever
deleted, only where the marker stands, and never through a symbolic link.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path

from accelerate import Accelerator

from grade.config import Config, EvaluationConfig, flatten, settings_with_role
from grade.config.sealed import config_from_sealed, sealed_yaml
from grade.errors import GradeError, NothingLeft, read_json, writing
from grade.files import check_writable, locked, replace_text, sync
from grade.formats import COUNT
from grade.hub_names import GIVEN
from grade.processes import everywhere, main_process_first, shared
from grade.sampling.engine_rollouts import FOLDER as ROLLOUT
from grade.training.resumable import has_resumable, resumable

MARKER = ".grade-run"
_MARKER_TEXT = (
    "A run of `grade train` is kept in this folder. --train.overwrite true deletes what the run wrote, and nothing "
    "else.\n"
)
_CLEARING = ".grade-clearing"
"""Stands in a run's folder while what the run wrote is deleted: what is left is no run."""
_IN_CHECKPOINT = (
    r"README\.md|(adapter_config|trainer_state|manifest)\.json|(adapter_model|trainer_state)\.safetensors"
    r"|(tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|processor_config)\.json"
    r"|(generation_)?config\.json|model\.safetensors|vocab\.txt|merges\.txt|chat_template\.jinja|[\w.-]+\.(model|tiktoken)"
)
_TEMPLATES = "additional_chat_templates"
SKIPPED, ROLLBACKS = "skipped", "rollbacks"
"""Folders of what `guard` keeps: the responses of steps that were left out, and the logs' rows of steps made again."""
SOUND = "rollback"
"""The name of the checkpoint that a rollback goes back to."""
_WRITTEN = {  # names of what a run writes, by the folder it lies in
    "checkpoints/*": _IN_CHECKPOINT,
    f"checkpoints/*/{_TEMPLATES}": r".+\.jinja",
    f"{ROLLOUT}/*": r"adapter_config\.json|adapter_model\.safetensors|README\.md",
    "reward*": r"head\.safetensors|reward\.json",
    "tensorboard": r"events\.out\.tfevents\..*",
    SKIPPED: r"step-\d+\.json(\.new)?",
    ROLLBACKS: r"\d+-(metrics|samples)\.jsonl(\.new)?",
    "": r"(config\.yaml|(metrics|samples)\.jsonl|run\.json|evaluation(-(test|validation)-[\w.-]+)?\.json)(\.new)?",
}
CHECKPOINT = rf"(last|resume-\d+|best(-\d+)?|{SOUND}|step-\d+)"
"""Names of a run's checkpoints: grade.training.resumable, grade.training.rollback and `adapter_folder`."""
_HOLDING = (
    rf"{CHECKPOINT}(\.new|\.old)?|reward(\.new|\.old)?|tensorboard|checkpoints|{_TEMPLATES}|{SKIPPED}|{ROLLBACKS}"
    rf"|{ROLLOUT}|grade-[0-9a-f]+-[0-9a-f]+-\d+"
)
"""Names of the folders that it makes."""

_OF_PROMPTS = {
    "task.prompt_max_tokens": "the prompts' longest, in tokens",
    "evaluation.test_prompts": "how many of test_prompts are tested",
}
"""Settings that follow from prompts that a program gave, in its terms."""
_SHOWS_WITHIN = 10.0  # seconds
_MICRO_BATCHES = {"train.batch_size", "train.accumulation_steps"}


def adapter_folder(run_dir: Path, step: int) -> Path:
    """Where `train.keep_adapters` keeps the adapter that was validated after `step` optimizer steps."""
    return run_dir / "checkpoints" / f"step-{step}"


def make_again(run_dir: Path) -> str:
    """What to do about a run whose files are damaged, as a sentence."""
    return f"Delete {run_dir}: the same command makes that run again."


def write_run_config(run_dir: Path, config: Config) -> None:
    """The run's config.yaml, replaced as a whole; its last line tells a damaged file.

    Whether this call resumed or overwrote is no setting of the run: who starts it from its own config means neither.

    Raises:
        GradeError: it cannot be written.
    """
    settings = replace(config, train=replace(config.train, resume=False, overwrite=False))
    with writing(run_dir / "config.yaml", "train.run_dir"):
        replace_text(run_dir / "config.yaml", sealed_yaml(settings))


def is_ours(run_dir: Path) -> bool:
    """Whether the marker of a run stands in a folder."""
    return (run_dir / MARKER).is_file() and not (run_dir / MARKER).is_symlink()


def is_begun(run_dir: Path) -> bool:
    """Whether a run in a folder has come as far as its record, and is not being deleted."""
    return (run_dir / "run.json").is_file() and not (run_dir / _CLEARING).exists()


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
            if run_dir.is_dir() and not _content(run_dir):  # the lock is ours, so nobody else is about to write here
                (run_dir / MARKER).unlink(missing_ok=True)
                if missing:
                    run_dir.rmdir()


@contextmanager
def started(config: Config, accelerator: Accelerator) -> Iterator[tuple[Config, Path]]:
    """Hold the run's folder, in the main process for all; yields the config as it is decided and the folder.

    Raises:
        GradeError: in every process, if the folder cannot be used.
    """
    with ExitStack() as stack:
        with main_process_first(accelerator):
            if accelerator.is_main_process:
                config = stack.enter_context(run_folder(config))
        seen = everywhere(accelerator, _seen(Path(config.run_dir)))
        if not all(seen):
            raise GradeError(
                f"train.run_dir: process {seen.index(False)} of {len(seen)} does not see {config.run_dir} as the main "
                "process does. Name a folder that all machines share: every process reads the run's checkpoints."
            )
        decided = shared(accelerator, (config.train.resume, config.train.overwrite))
        train = replace(config.train, resume=decided[0], overwrite=decided[1])
        yield replace(config, train=train), Path(config.run_dir)


def _seen(run_dir: Path) -> bool:
    """Whether the folder of a run that has been begun is here; a network's drive may show it a little later."""
    until = time.monotonic() + _SHOWS_WITHIN
    while not (run_dir / MARKER).is_file() and time.monotonic() < until:
        time.sleep(0.2)
    return (run_dir / MARKER).is_file()


def decided(config: Config) -> Config:
    """`train.resume: auto` as what it means for the folder as it is: continue a checkpoint, or start, over what a run
    left that was stopped before its first checkpoint."""
    if config.train.resume != "auto":
        return config
    run_dir = Path(config.run_dir)
    resume = has_resumable(run_dir) and not (run_dir / _CLEARING).exists()
    over = not resume and is_ours(run_dir) and bool(_content(run_dir)) and not _has_work(run_dir)
    return replace(config, train=replace(config.train, resume=resume, overwrite=over))


def _has_work(run_dir: Path) -> bool:
    """Whether there is something that a start from nothing would lose: a checkpoint of any kind, or one that may lie
    behind a link that leads nowhere."""
    if (run_dir / _CLEARING).exists():
        return False
    folder = run_dir / "checkpoints"
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return folder.is_symlink() or any(re.fullmatch(rf"{CHECKPOINT}(\.old)?", name) for name in names)


def prepare_run_dir(config: Config) -> Path:
    """The run's folder: free, or holding a run to resume or to overwrite (which `fit` deletes, once all is loaded).

    Raises:
        GradeError: it holds another run's files, or nothing to resume, or cannot be written.
    """
    run_dir = Path(config.run_dir)
    marker = run_dir / MARKER
    if marker.is_symlink() or os.path.lexists(marker) and not marker.is_file():
        raise GradeError(f"train.run_dir: {marker} is no file of a run. Name another folder with --train.run_dir.")
    if config.train.resume:
        _check_resumable(config, run_dir)
    elif run_dir.exists() and (not run_dir.is_dir() or _content(run_dir)):
        _check_replaceable(run_dir, config.train.overwrite, config.reward.path)
    check_writable("train.run_dir", run_dir)
    return run_dir


def _check_resumable(config: Config, run_dir: Path) -> None:
    if (run_dir / _CLEARING).exists():
        raise GradeError(
            f"train.resume: the run in {run_dir} was being deleted when that was stopped. Start again with "
            "--train.overwrite true."
        )
    found = resumable(run_dir)
    done = found.state["step"]
    differing = differing_settings(config_from_sealed(run_dir / "config.yaml"), config)
    if differing:
        raise GradeError(
            f"train.resume: {run_dir} was started with other settings: {differing}. Put them back, or start "
            "another run with --train.run_dir (in Python config.train.run_dir)."
        )
    steps = config.train.steps
    finished = not found.wrong and is_finished(run_dir, steps, config.evaluation)  # or the files are of a later step
    if done > steps or (done == steps and finished):
        kind = NothingLeft if done == steps else GradeError
        raise kind(
            f"train.resume: {run_dir} has had {done} steps, train.steps is {steps}: there is nothing "
            "left to do. Raise train.steps to go on, or look at it with `grade report`."
        )


def _check_replaceable(run_dir: Path, overwrite: bool, reward_path: str | None) -> None:
    elsewhere = "name another folder with --train.run_dir or --name"
    if not run_dir.is_dir():
        raise GradeError(f"train.run_dir: {run_dir} is a file: {elsewhere}.")
    if not is_ours(run_dir):
        what = "so nothing is deleted there" if overwrite else "and it is not empty"
        raise GradeError(f"train.run_dir: {run_dir} is no folder of a run ({MARKER} is missing), {what}: {elsewhere}.")
    if overwrite:
        link = next((path for path in (run_dir, *_written(run_dir)) if path.is_symlink()), None)
        if link is not None:
            raise GradeError(
                f"train.overwrite: {link} is a symbolic link, and nothing is deleted through one. Remove the link "
                f"yourself, or {elsewhere}."
            )
        if reward_path is not None and Path(reward_path).resolve().is_relative_to(run_dir.resolve()):
            raise GradeError(
                f"train.overwrite: reward.path={reward_path} lies in {run_dir}, whose head would be deleted. "
                f"Copy it elsewhere, or {elsewhere}."
            )
        return
    if has_resumable(run_dir):
        raise GradeError(
            f"train.run_dir: {run_dir} already holds a run. Continue it with --train.resume true, replace it with "
            f"--train.overwrite true, or {elsewhere}."
        )
    if _has_work(run_dir):
        raise GradeError(
            f"train.run_dir: {run_dir} holds checkpoints of a run, but not the one to go on from (checkpoints/last is "
            f"missing). Put it back, replace the run with --train.overwrite true, or {elsewhere}."
        )
    raise GradeError(
        f"train.run_dir: {run_dir} holds a run that was stopped before its first checkpoint. Start it again with "
        f"--train.resume auto, or {elsewhere}."
    )


def _content(run_dir: Path) -> list[Path]:
    """What a folder holds beside the marker."""
    return [path for path in run_dir.iterdir() if path.name != MARKER]


def _written(run_dir: Path) -> list[Path]:
    """What a run has written, in the order in which it may go: files, then the folders that held them."""
    folders = [run_dir / "checkpoints", *sorted(run_dir.glob("checkpoints/*")), *sorted(run_dir.glob("reward*"))]
    folders += [run_dir / ROLLOUT, *sorted(run_dir.glob(f"{ROLLOUT}/*"))]
    folders += sorted(run_dir.glob(f"checkpoints/*/{_TEMPLATES}"))
    folders += [run_dir / name for name in ("tensorboard", SKIPPED, ROLLBACKS)]
    folders = [path for path in folders if re.fullmatch(_HOLDING, path.name)]
    folders = [path for path in folders if path.is_dir() or path.is_symlink()]
    files = []
    for pattern, names in _WRITTEN.items():
        for folder in [run_dir] if not pattern else [path for path in run_dir.glob(pattern) if path in folders]:
            if not folder.is_symlink():
                files += [path for path in sorted(folder.iterdir()) if re.fullmatch(names, path.name)]
    return files + folders[::-1]


def clear(run_dir: Path) -> None:
    """Delete what a run has written, and leave what anybody else put there.

    Raises:
        GradeError: something cannot be deleted.
    """
    with writing(run_dir, "train.overwrite", f"Delete {run_dir} yourself, or name another folder."):
        (run_dir / _CLEARING).touch()
        sync(run_dir)  # before anything is gone
        for path in _written(run_dir):
            if path.is_symlink():
                continue  # refused by `prepare_run_dir`, unless it was made since then
            if path.is_file():
                path.unlink()
            elif not any(path.iterdir()):  # unless somebody else put something there
                path.rmdir()
        (run_dir / _CLEARING).unlink()


def differing_settings(before: Config, now: Config) -> str:
    """The settings in which a run would be another one, as words; empty if there are none."""
    old, new = flatten(asdict(before)), flatten(asdict(now))
    free = set(settings_with_role("resume", "speed", "place"))
    if now.method.minibatches > 1:
        free -= {"generation.batch_size"}  # what is decoded together decides which responses share a mini-batch
    elif not now.method.replay_dropout:
        free |= _MICRO_BATCHES  # the responses of a whole step must stay, which the checkpoint's inputs tell
    names = [name for name in new if old[name] != new[name] and name not in free]
    words = _OF_PROMPTS if now.task.dataset.startswith(GIVEN) else {}
    return ", ".join(f"{words.get(name, name)} ({old[name]} then, {new[name]} now)" for name in names)


def is_finished(run_dir: Path, steps: int, evaluation: EvaluationConfig) -> bool:
    """Whether a run has had all its steps, their validations and, if there is one, its test.

    Raises:
        GradeError: its evaluation.json is damaged.
    """
    path = run_dir / "evaluation.json"
    if not path.is_file():
        return False
    fix = "Delete that file: going on with the run makes it again from its checkpoint."
    done = read_json(path, fix, shape={"validation": [{"step": COUNT}]})
    validated = done["validation"][-1]["step"] if done["validation"] else 0
    return validated >= steps and ("test" in done or evaluation.test_prompts == 0)

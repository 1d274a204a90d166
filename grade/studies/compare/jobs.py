"""Training runs as child processes: several at a time, each resumable, a failure never taking the others with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from grade import files
from grade.config import Config
from grade.config.reading import config_to_yaml
from grade.config.sealed import config_from_sealed
from grade.errors import GradeError, read_json, writing
from grade.files import latest
from grade.formats import RECORD
from grade.model.checkpoint import load_state
from grade.model.fingerprint import differing
from grade.studies.compare.comparison import RunCurve, read_run
from grade.training.interrupt import stop_between_steps
from grade.training.log import beginning
from grade.training.run_folder import differing_settings, is_begun, is_finished, make_again

_POLL_SECONDS = 0.5


@dataclass(frozen=True, eq=False)
class Job:
    """One `grade train`; told from others by identity, as a config cannot be hashed.

    Args:
        name: unique; names its files.
        config: with `train.run_dir` set.
    """

    name: str
    config: Config

    @property
    def run_dir(self) -> Path:
        return Path(self.config.run_dir)

    @property
    def finished(self) -> bool:
        """Whether the run has had all that it was to have."""
        return is_finished(self.run_dir, self.config.train.steps, self.config.evaluation)

    @property
    def log(self) -> Path:
        """Where the child's output goes."""
        return self.run_dir.with_name(self.run_dir.name + ".log")


def locked(folder: Path) -> AbstractContextManager[int]:
    """Keep a second comparison out of `folder` while the block runs; gives the lock's descriptor, for `run_jobs`.

    Raises:
        GradeError: it is locked, or its file system has no locks.
    """
    return files.locked(
        folder / "lock",
        "output_dir",
        f"{folder} is in use by another `grade compare`, or by a run that one left behind: wait for it or stop it, or "
        "compare under another --name.",
    )


def curve_of(job: Job, method: str, seed: int) -> RunCurve:
    """The curve of a run that has ended well.

    Raises:
        GradeError: its files are damaged.
    """
    last = latest(job.run_dir / "checkpoints" / "last")
    if last.is_dir():
        beginning(job.run_dir / "metrics.jsonl", load_state(last)["logs"]["metrics.jsonl"])
    curve = read_run(job.run_dir, method, seed)
    if not len(curve.tokens) == curve.validations[-1].step == job.config.train.steps:
        raise GradeError(f"{job.run_dir}/metrics.jsonl lacks steps or validations. {make_again(job.run_dir)}")
    return curve


def check_jobs(jobs: Sequence[Job], inputs: Mapping[str, str]) -> None:
    """Refuse to continue, or to count, runs that were made under other settings or from something else.

    Args:
        inputs: fingerprint of what the runs read (`grade.model.fingerprint.inputs_of`).

    Raises:
        GradeError: naming the run and what differs; or the run's settings are missing or damaged.
    """
    for job in jobs:
        if not is_begun(job.run_dir):
            continue  # it starts, or starts again
        try:
            before = config_from_sealed(job.run_dir / "config.yaml")
        except GradeError as error:
            raise GradeError(f"{error} {make_again(job.run_dir)}") from error
        record = read_json(job.run_dir / "run.json", make_again(job.run_dir), shape=RECORD)
        train = job.config.train
        now = {**inputs, "responses_per_step": train.batch_size * train.accumulation_steps}
        changed = differing_settings(before, job.config) or differing(record["inputs"], now)
        if changed:
            raise GradeError(
                f"{job.run_dir} was started with other settings or data: {changed}. Put them back, delete that folder, "
                "or compare under another --name."
            )


def train_command(settings: Path) -> list[str]:
    """What a child runs."""
    return [sys.executable, "-m", "grade", "train", str(settings)]


def run_jobs(
    jobs: Sequence[Job],
    at_once: int,
    console: Console,
    *,
    lock: int,
    command: Callable[[Path], list[str]] = train_command,
) -> dict[str, str]:
    """Run what is not finished yet, in the order of `jobs`; returns why the failed ones failed, by job name.

    Each child gets an equal share of the CPU's threads, so that peak memory and seconds are its own. An interruption
    (Ctrl-C or SIGTERM) is passed on: every run stops after its step, keeps a checkpoint, and is continued by the next
    call.

    Args:
        lock: what `locked` gave. The children hold it too: a run that outlives its parent, and still writes there,
            keeps the folder locked.
        command: of a child, given the file of its settings.

    Raises:
        GradeError: a run's evaluation.json is damaged; nothing was started.
        KeyboardInterrupt: interrupted; all children have ended, unless a second Ctrl-C did not wait for them.
    """
    waiting = [job for job in jobs if not job.finished]
    running: dict[Job, subprocess.Popen] = {}
    failures: dict[str, str] = {}
    done, total = len(jobs) - len(waiting), len(jobs)
    if done:
        console.print(f"Runs finished before: {done} of {total}.", highlight=False)
    with stop_between_steps("every run saves its last step") as stop:
        try:
            while waiting or running:
                while waiting and len(running) < at_once:
                    job = waiting.pop(0)
                    running[job] = _start(job, at_once, lock, command)
                time.sleep(_POLL_SECONDS)
                if stop.asked:
                    raise KeyboardInterrupt
                for job, process in [(j, p) for j, p in running.items() if p.poll() is not None]:
                    del running[job]
                    done += 1
                    if process.returncode != 0:
                        failures[job.name] = _why_it_failed(job, process.returncode)
                    state = f"failed, see {job.log}" if job.name in failures else "done"
                    console.print(f"[{done}/{total}] {job.name}: {state}", highlight=False, markup=False)
        except BaseException:
            _stop(running)
            raise
    return failures


def _start(job: Job, at_once: int, lock: int, command: Callable[[Path], list[str]]) -> subprocess.Popen:
    train = replace(job.config.train, resume="auto")
    settings = job.run_dir.with_name(job.run_dir.name + ".yaml")
    with writing(settings, "output_dir"):
        job.run_dir.parent.mkdir(parents=True, exist_ok=True)
        settings.write_text(config_to_yaml(replace(job.config, train=train)), encoding="utf-8")
        log = job.log.open("w", encoding="utf-8")  # this attempt's words alone
    threads = os.environ.get("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // at_once, 1)))
    with log:
        return subprocess.Popen(
            command(settings),
            stdout=log,
            stderr=subprocess.STDOUT,
            pass_fds=(lock,),
            env={**os.environ, "OMP_NUM_THREADS": threads},
        )


def _stop(running: dict[Job, subprocess.Popen]) -> None:
    """Ask the children to stop after their step, and wait until they have saved."""
    for process in running.values():
        process.send_signal(signal.SIGTERM)
    for process in running.values():
        process.wait()


def _why_it_failed(job: Job, returncode: int) -> str:
    """The signal that killed a child, or else the end of its output."""
    if returncode < 0:
        name = {known.value: known.name for known in signal.Signals}.get(-returncode, f"signal {-returncode}")
        return f"killed by {name}" + (", perhaps for lack of memory" if name == "SIGKILL" else "")
    # A reason may quote a text with separators such as U+2028, at which only `splitlines` ends a line.
    text = job.log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n")
    lines = [line.strip() for line in text.split("\n")]
    errors = [line for line in lines if line.startswith("grade: error:")]
    return (errors or [line for line in lines if line] or ["no output"])[-1]

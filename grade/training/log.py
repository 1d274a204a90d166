"""What a run writes while it runs: metrics.jsonl, samples.jsonl, tensorboard, optionally Weights & Biases.

A checkpoint holds the length and the SHA-256 of both files as they were when it was written. A resumed run goes back to
just that, or is refused where they are something else.
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grade.config import TrainConfig
from grade.errors import GradeError, failure_of, present, reason_of, writing
from grade.files import replace_bytes, sync
from grade.jsonl import append_rows, encode_rows, read_rows

Extent = tuple[int, str]
"""Bytes of a file's beginning, and their SHA-256."""

_FILES = ("metrics.jsonl", "samples.jsonl")
GO_ON = "Make room, and go on from the last checkpoint with --train.resume auto."
"""What to do where a file of a run cannot be written."""


class RunLog:
    """Appends to the run's files; on processes other than the main one it writes nothing.

    Args:
        train: which loggers, and what they are told.
        settings: of the whole run, which Weights & Biases shows.
        written: what `extents` said when the checkpoint was written that the run is continued from; None: a new run.
        resume_step: optimizer steps of that checkpoint.

    Raises:
        GradeError: the files do not begin with what is `written`, or cannot be written.
    """

    def __init__(
        self,
        run_dir: Path,
        train: TrainConfig,
        *,
        enabled: bool,
        settings: Mapping[str, Any] | None = None,
        written: Mapping[str, Extent] | None = None,
        resume_step: int = 0,
    ):
        self.run_dir, self.enabled = run_dir, enabled
        self._tensorboard: Any = None
        self._wandb: Any = None
        if not enabled:
            return
        kept = {name: b"" if written is None else beginning(run_dir / name, written[name]) for name in _FILES}
        for name, content in kept.items():
            path = run_dir / name
            if path.exists() and path.stat().st_size != len(content):
                with writing(path, "train.run_dir"):
                    replace_bytes(path, content)
        self._sizes = {name: len(content) for name, content in kept.items()}
        self._digests = {name: hashlib.sha256(content) for name, content in kept.items()}
        if train.tensorboard:
            self._open_tensorboard(resume_step or None)
        if train.wandb:
            self._wandb = _start_wandb(train.wandb_project, run_dir, settings)

    def metrics(self, step: int, values: dict[str, float]) -> None:
        if not self.enabled:
            return
        # JSON has no number that is not finite.
        row = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._append("metrics.jsonl", [{"step": step, **row}])
        if self._tensorboard is not None:
            self._scalars(step, values)
        if self._wandb is not None:
            self._wandb.log(values, step=step)

    def samples(self, step: int, samples: list[dict]) -> None:
        if self.enabled:
            self._append("samples.jsonl", [{"step": step, **s} for s in samples])

    def extents(self) -> dict[str, Extent]:
        """Length and hash of each file so far, once they are on the disk: a checkpoint must not be ahead of them."""
        for path in (self.run_dir / name for name in _FILES):
            if path.exists():
                with writing(path, "train.run_dir", GO_ON):
                    sync(path)
        return {name: (self._sizes[name], self._digests[name].hexdigest()) for name in _FILES}

    def set_aside(self, written: Mapping[str, Extent], folder: Path, name: str) -> None:
        """Go back to what a checkpoint knows, whose steps are made again: the rows since then are copied to
        FOLDER/NAME-metrics.jsonl and FOLDER/NAME-samples.jsonl. They go from the run's own files by `cut`, once a
        checkpoint says that the run went back: an earlier one needs them.

        Args:
            written: what `extents` said when the checkpoint was written.

        Raises:
            GradeError: the files do not begin with it, or cannot be written.
        """
        if not self.enabled:
            return
        for log in _FILES:
            path, kept = self.run_dir / log, beginning(self.run_dir / log, written[log])
            with writing(folder, "train.run_dir", GO_ON):
                folder.mkdir(exist_ok=True)
                since = path.read_bytes()[len(kept) :] if path.exists() else b""
                replace_bytes(folder / f"{name}-{log}", since)
            self._sizes[log], self._digests[log] = len(kept), hashlib.sha256(kept)

    def cut(self, step: int) -> None:
        """Take from the files what was set aside, and go on after `step` optimizer steps."""
        if not self.enabled:
            return
        for log in _FILES:
            path = self.run_dir / log
            if path.exists():
                with writing(path, "train.run_dir", GO_ON):
                    replace_bytes(path, path.read_bytes()[: self._sizes[log]])
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._open_tensorboard(step)

    def close(self) -> None:
        if self._tensorboard is not None:
            with writing(self.run_dir / "tensorboard", "train.run_dir"):
                self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()

    def _append(self, name: str, rows: list[dict]) -> None:
        with writing(self.run_dir / name, "train.run_dir", GO_ON):
            append_rows(self.run_dir / name, rows)
        content = encode_rows(rows)
        self._sizes[name] += len(content)
        self._digests[name].update(content)

    def _open_tensorboard(self, purge_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        with writing(self.run_dir / "tensorboard", "train.run_dir"):
            self._tensorboard = SummaryWriter(str(self.run_dir / "tensorboard"), purge_step=purge_step)
        # Purged are the scalars of all later rows and, with them, of a validation after just as many steps.
        for row in read_rows(self.run_dir / "metrics.jsonl").rows:
            if row["step"] == purge_step:
                self._scalars(row["step"], row)

    def _scalars(self, step: int, values: Mapping[str, float | None]) -> None:
        board = present(self._tensorboard)
        with writing(self.run_dir / "tensorboard", "train.run_dir", GO_ON):
            for name, value in values.items():
                if name != "step" and value is not None and math.isfinite(value):
                    board.add_scalar(name, value, step)


def beginning(path: Path, extent: Extent, fix: str = " Put it back, or make the run again.") -> bytes:
    """The part of a file that a checkpoint knows.

    Args:
        fix: what to do where it is not there, for the message.

    Raises:
        GradeError: the file does not begin with it.
    """
    size, digest = extent
    try:
        content = path.read_bytes()[:size] if size else b""
    except OSError as error:
        reason = failure_of(error)
        raise GradeError(f"{path} cannot be read ({reason}).{fix}") from error
    if len(content) < size or hashlib.sha256(content).hexdigest() != digest:
        raise GradeError(
            f"{path} is damaged: it does not begin with what the run had written there at its last checkpoint.{fix}"
        )
    return content


def check_loggers(train: TrainConfig) -> None:
    """Refuse, before anything is loaded and anything of an earlier run is deleted, what cannot be logged to.

    Raises:
        GradeError: wandb is asked for, and is not installed or has no key; nothing is asked on the terminal.
    """
    if not train.wandb:
        return
    if importlib.util.find_spec("wandb") is None:
        raise GradeError("train.wandb is true but wandb is not installed: pip install 'grade-align[wandb]'.")
    import wandb

    fix = (
        "Call `wandb login` once, or set WANDB_API_KEY; WANDB_MODE=offline writes files that `wandb sync` sends later, "
        "and train.wandb false does without."
    )
    try:
        has_key = wandb.setup().settings.mode in ("offline", "disabled") or wandb.login(prompt=False, verify=False)
    except Exception as error:  # of any class of theirs
        raise _not_started(error, fix) from error
    if not has_key:
        raise GradeError(f"train.wandb is true but wandb has no API key. {fix}")


def _start_wandb(project: str, run_dir: Path, settings: Mapping[str, Any] | None) -> Any:
    import wandb

    try:
        return wandb.init(project=project, name=run_dir.name, dir=str(run_dir), config=settings)
    except Exception as error:  # of any class of theirs: the key is not theirs, or the server is not reached
        raise _not_started(error, "Log in again (`wandb login`), or set WANDB_MODE=offline.") from error


def _not_started(error: Exception, fix: str) -> GradeError:
    return GradeError(f"train.wandb is true but wandb does not start: {reason_of(error).rstrip('.')}. {fix}")

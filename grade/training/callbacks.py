"""What a program of the user's hears of a run while it trains, and how it ends one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from grade.errors import GradeError, reason_of
from grade.training.evaluation import Evaluation

STOP = "stop"
"""What `Callback.on_step` returns to end the run."""


class Callback:
    """A subclass overrides what it wants to hear of; all of it is called in the main process only.

    An exception of a callback, SystemExit included, ends the run with a GradeError, once what is done has been saved.
    `trainer` is the `GradeTrainer` that was given the callback: its `policy`, `config` and `generate` may be used, and
    nothing of the policy may be changed.
    """

    def on_step(self, trainer: Any, step: int, metrics: Mapping[str, float]) -> str | None:
        """After every optimizer step.

        Args:
            step: optimizer steps that the policy has had, 1 or more.
            metrics: as metrics.jsonl has them.

        Returns:
            "stop" to end the run here: the policy is validated, saved and, if there are test prompts, tested.
        """
        return None

    def on_validation(self, trainer: Any, evaluation: Evaluation) -> None:
        """After every validation: of the base model (`evaluation.model` is "base"), then of the policy."""

    def on_save(self, trainer: Any, folder: Path) -> None:
        """After a checkpoint has been written to `folder`."""

    def on_end(self, trainer: Any) -> None:
        """After the last step and the test."""


class Callbacks:
    """The callbacks of a run as its loop calls them.

    Args:
        called: in this order; one may stand by itself.
        trainer: what they are given.
    """

    def __init__(self, called: Sequence[Callback] | Callback | None = (), trainer: Any = None):
        called = (called,) if isinstance(called, Callback) else called or ()
        for callback in called:
            if not isinstance(callback, Callback):
                raise GradeError(
                    f"callbacks: {callback!r} is no grade.Callback. Subclass it, and override on_step, on_validation, "
                    "on_save or on_end."
                )
        self.called, self.trainer = tuple(called), trainer
        self.main = True
        self.any_process: Callable[[bool], bool] = bool
        self._asked = False
        self._failure: GradeError | None = None

    def begin(self, main: bool, any_process: Callable[[bool], bool]) -> None:
        """Say whether this is the main process, and how processes agree."""
        self.main, self.any_process = main, any_process

    def __call__(self, event: str, *arguments: object) -> None:
        """Tell the callbacks of an event; what they answer or raise is kept until the loop asks for it."""
        if not self.main:
            return
        for callback in self.called:
            try:
                answer = getattr(callback, event)(self.trainer, *arguments)
            except (Exception, SystemExit) as error:
                if self._failure is None:
                    name = f"{type(callback).__name__}.{event}"
                    self._failure = GradeError(f"callbacks: {name} raised {type(error).__name__}: {reason_of(error)}")
                    self._failure.__cause__ = error
                continue
            if event == "on_step" and answer not in (None, STOP) and self._failure is None:
                name = type(callback).__name__
                self._failure = GradeError(f'callbacks: {name}.on_step returned {answer!r}, not "{STOP}" or None.')
            self._asked = self._asked or (event == "on_step" and answer == STOP)

    def stopping(self) -> bool:
        """Whether a callback has asked for the end, or raised; the same in every process."""
        return bool(self.called) and self.any_process(self._asked or self._failure is not None)

    def check(self, kept: str) -> None:
        """End the run if a callback raised.

        Args:
            kept: which checkpoints there are, as a sentence.

        Raises:
            GradeError: in every process, naming the callback.
        """
        if self.called and self.any_process(self._failure is not None):
            failure = self._failure or GradeError("callbacks: one of the main process raised.")
            raise GradeError(f"{str(failure).rstrip('.')}. {kept} Mend it, and go on with --train.resume auto.") from (
                failure.__cause__
            )

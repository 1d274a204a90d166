"""Go back to the last checkpoint within all bounds of `guard`, and on from there with a lower learning rate.

The checkpoint is written where the run saves anyway, at every `train.save_every` steps and where the policy is the best
so far, if no measure is beyond its bound there, and at the start. So the best one is never later than it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from accelerate import Accelerator

from grade.errors import Collapsed
from grade.files import latest
from grade.methods.base import Method
from grade.model.checkpoint import load_state
from grade.processes import main_process_first
from grade.training.checkpoints import Checkpoints
from grade.training.guard import Guard
from grade.training.log import RunLog
from grade.training.optimization import Optimization
from grade.training.progress import TrainingProgress
from grade.training.resuming import put_back
from grade.training.run_folder import ROLLBACKS, SOUND
from grade.training.saving import Saving


class Rollback:
    """Takes a run back; of everything that a checkpoint restores.

    Args:
        inputs: fingerprint of what the run reads (`grade.model.fingerprint`).
    """

    def __init__(
        self,
        inputs: Mapping[str, Any],
        method: Method,
        optimization: Optimization,
        guard: Guard,
        checkpoints: Checkpoints,
        accelerator: Accelerator,
    ) -> None:
        self._inputs, self._method, self._optimization = inputs, method, optimization
        self._guard, self._checkpoints, self._accelerator = guard, checkpoints, accelerator

    def prepare(self, step: int, state: Callable[[], dict[str, Any]]) -> None:
        """Before the first step of a session: see that there is a checkpoint to go back to, where there may be need.

        Args:
            state: as `Checkpoints.save_last` takes it.
        """
        if not self._guard.rolls_back or self._is_within(step):
            return
        if self._checkpoints.saved is None:  # a run that is killed between the two must find this one
            self._checkpoints.save_last(step, state)
        self._checkpoints.save_sound(step, state)

    def heed(self, step: int, progress: TrainingProgress, log: RunLog, saving: Saving) -> int:
        """Act on an alarm, if there is one; the steps that the run goes on after: fewer where it went back.

        Args:
            step: optimizer steps that the policy has had.

        Raises:
            Collapsed: the run ends here, and is saved.
            GradeError: a checkpoint is damaged, or a file cannot be written.
        """
        alarm = self._guard.alarm()
        if alarm is None:
            return step
        if not self._guard.may_roll_back() or not self._is_within(step - 1):
            saving.save_before_an_end(step)
            raise Collapsed(self._guard.verdict(step, alarm, self._checkpoints.kept()))
        to = self._go_back(step, alarm, log, saving.state)
        progress.warn(
            f"warning: {alarm}. The run goes back from step {step} to step {to}, and on with "
            f"{self._guard.rate_factor:g} times train.learning_rate."
        )
        progress.go_back(step - to)
        return to

    def _is_within(self, step: int) -> bool:
        """Whether there is such a checkpoint, of at most `step` optimizer steps and not before the best one: another
        one is left from before the run was resumed under other settings."""
        checkpoints = self._checkpoints
        at = checkpoints.sound_at() if self._accelerator.is_main_process else None
        fits = at is not None and at <= step and checkpoints.validations.best_stays(at)
        return self._method.services.any_process(fits)

    def _go_back(self, step: int, reason: str, log: RunLog, state: Callable[[], dict[str, Any]]) -> int:
        """Put everything back. The checkpoint to go on from is written before anything of the steps that are made again
        goes: a run that is killed in between goes on from one or the other."""
        checkpoints, method, run_dir = self._checkpoints, self._method, self._checkpoints.run_dir
        with main_process_first(self._accelerator):
            folder, adamw = latest(run_dir / "checkpoints" / SOUND), self._optimization.adamw
            found = load_state(folder)
            put_back(folder, found, run_dir, self._inputs, method.policy, adamw, method)
        number = self._guard.rolled_back(step, found["step"], reason)
        self._optimization.rate_factor = self._guard.rate_factor
        checkpoints.validations.restore(found["evaluations"], found["best"])
        log.set_aside(found["logs"], run_dir / ROLLBACKS, str(number))
        checkpoints.save_last(found["step"], state)
        log.cut(found["step"])
        checkpoints.record.evaluations()
        self._guard.note()
        return found["step"]

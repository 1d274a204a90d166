"""A run between two steps: what a checkpoint holds of it beside the weights, when one is written, what is put back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator

from grade.config import TrainConfig
from grade.errors import RewardFailed, RolloutFailed
from grade.methods.base import Method
from grade.processes import main_process_first
from grade.training.checkpoints import Checkpoints
from grade.training.guard import Guard
from grade.training.log import Extent
from grade.training.optimization import Optimization
from grade.training.resumable import Resumable
from grade.training.resuming import restored
from grade.training.soundness import Soundness
from grade_kernels.common import cpu_products


@dataclass
class Saving:
    """Saves a run, and puts it back; all processes call each of its methods together.

    Args:
        train: of the settings.
        inputs: fingerprint of what the run reads (`grade.model.fingerprint`).
        logs: how far the run's files have come (`RunLog.extents`).
    """

    train: TrainConfig
    inputs: Mapping[str, Any]
    method: Method
    optimization: Optimization
    guard: Guard
    soundness: Soundness
    checkpoints: Checkpoints
    accelerator: Accelerator
    logs: Callable[[], dict[str, Extent]]

    def restored(self) -> Resumable:
        """The newest whole checkpoint, once its weights and all of its state are put back but the logs.

        Raises:
            GradeError: there is none, or it is of another run.
        """
        checkpoints, optimization, method = self.checkpoints, self.optimization, self.method
        found = restored(checkpoints.run_dir, self.inputs, method.policy, optimization.adamw, method)
        checkpoints.saved = found.state["step"]
        checkpoints.validations.restore(found.state["evaluations"], found.state["best"])
        self.guard.load_state_dict(found.state.get("guard", {}))  # checkpoints of earlier versions have none
        optimization.rate_factor = self.guard.rate_factor
        return found

    def state(self) -> dict[str, Any]:
        """What a checkpoint to go on from holds beside the weights; of the main process."""
        validations = self.checkpoints.validations
        return {
            "optimizer": self.optimization.adamw.state_dict(),
            "method": self.method.state_dict(),
            "kl_coef": self.method.kl_coef,
            "guard": self.guard.state_dict(),
            "inputs": self.inputs,
            "reward": self.method.reward.state_dict(),
            "best": validations.best,
            "evaluations": validations.rows,
            "steps": self.train.steps,
            "logs": self.logs(),
            "cpu_products": cpu_products.record(),
        }

    def save(self, step: int, *, best: bool = False) -> None:
        """The checkpoint to go on from, after `step` optimizer steps, and then, if the policy is the best so far, the
        best one.

        Raises:
            GradeError: the policy is broken, or the checkpoint cannot be written.
        """
        self.soundness.check(step)
        if self.guard.rolls_back and not self.guard.beyond() and (best or step % self.train.save_every == 0):
            self.checkpoints.save_sound(step, self.state)
        self.checkpoints.save_last(step, self.state)
        if best:
            self.checkpoints.save_best(step)

    def save_before_an_end(self, step: int) -> None:
        """As `save`, unless that is done, where all processes end next: they wait for the main one, since a launcher
        ends the others once one of them has ended."""
        self.soundness.check(step)  # by all processes, whose layers may be sharded
        with main_process_first(self.accelerator):
            if step != self.checkpoints.saved:
                self.save(step)

    @contextmanager
    def saved_where_others_fail(self, step: Callable[[], int]) -> Iterator[None]:
        """Save what was done before: a step or an evaluation whose reward fails, and a step whose responses cannot be
        had, has changed nothing of it. It fails in all processes.

        Args:
            step: gives the optimizer steps that the policy has had.
        """
        try:
            yield
        except (RewardFailed, RolloutFailed) as error:
            if step() == 0:
                raise
            self.save_before_an_end(step())
            raise type(error)(f"{error} {self.checkpoints.kept()}") from error

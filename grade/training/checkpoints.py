"""The checkpoints of a run: the last ones to go on from, the best by validation, and the adapters of validations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from grade.errors import GradeError, writing
from grade.files import delete_folder, latest, old_copy
from grade.model.checkpoint import load_adapter, recorded_step, replace_card, save_checkpoint, verified_step
from grade.model.policy import Policy
from grade.training.callbacks import Callbacks
from grade.training.record import RunRecord
from grade.training.resumable import EARLIER, EARLIER_BEST, Resumable, go_on_from, keep, place_of
from grade.training.run_folder import SOUND, adapter_folder
from grade.training.validations import Validations


class Checkpoints:
    """Writes them with their model cards; on processes other than the main one nothing.

    Args:
        callbacks: hear of what was saved.
        count: `train.keep_checkpoints`.

    Attributes:
        run_dir, record, validations: as given.
        saved: optimizer steps of the last checkpoint; None: there is none yet.
        holds_best: whether the policy is the best checkpoint, and no longer the last step's.
    """

    def __init__(
        self,
        run_dir: Path,
        policy: Policy,
        record: RunRecord,
        validations: Validations,
        callbacks: Callbacks,
        *,
        count: int,
        enabled: bool,
    ) -> None:
        self.run_dir, self._policy, self.record, self._count = run_dir, policy, record, count
        self.validations, self._callbacks, self._enabled = validations, callbacks, enabled
        self._best = run_dir / "checkpoints" / "best"
        self._sound = run_dir / "checkpoints" / SOUND
        self.saved: int | None = None
        self.holds_best = False

    def go_on_from(self, found: Resumable) -> None:
        """Make what a run goes on from its last checkpoint, and its best the best; in the main process, once all have
        read them."""
        if self._enabled:
            go_on_from(self.run_dir, found, self._count)
            if (recorded_step(latest(self._sound)) or 0) > found.state["step"]:  # of steps that are made again
                with writing(self._sound, "train.run_dir"):
                    delete_folder(old_copy(self._sound))
                    delete_folder(self._sound)

    def save_last(self, step: int, state: Callable[[], dict[str, Any]]) -> None:
        """The checkpoint to go on from, after `step` optimizer steps.

        Args:
            state: gives what the trainer needs beside the weights; asked in the main process.
        """
        folder = self.run_dir / "checkpoints" / "last"
        if self._enabled:
            place = self._place(EARLIER, step)
            save_checkpoint(folder, self._policy, step, state(), card=self.record.card(step), place=place)
            keep(self.run_dir, step, self._count)
        self.saved = step
        self._callbacks("on_save", folder)

    def save_sound(self, step: int, state: Callable[[], dict[str, Any]]) -> None:
        """The same for a rollback to go back to: a place of its own, since the last one may be of any step at which
        somebody stopped the run, and a run that was stopped must go back to where one that was not does."""
        if self._enabled:
            save_checkpoint(self._sound, self._policy, step, state(), card=self.record.card(step))

    def sound_at(self) -> int | None:
        """Optimizer steps of that checkpoint; None where there is none, or a damaged one."""
        try:
            return verified_step(latest(self._sound))
        except GradeError:
            return None

    def save_best(self, step: int) -> None:
        """The policy as the best so far, which the checkpoint to go on from says already: one that no state names would
        be lost by the next kill, and so would the one whose place it took."""
        if self._enabled:
            place = self._place(EARLIER_BEST, step)
            save_checkpoint(self._best, self._policy, step, card=self.record.card(step), place=place)
            keep(self.run_dir, step, self._count)
            self._callbacks("on_save", self._best)

    def keep_adapter(self, step: int) -> None:
        """The adapter of a validation."""
        if self._enabled:
            save_checkpoint(adapter_folder(self.run_dir, step), self._policy, step, card=self.record.card(step))

    def load_best(self) -> None:
        """Put the best checkpoint into the policy; every process reads it, once it is written."""
        load_adapter(latest(self._best), self._policy)
        self.holds_best = True

    def note_test(self, step: int, test: Mapping[str, Any]) -> None:
        """Write the test's evaluations into the best checkpoint's card."""
        if self._enabled:
            replace_card(self._best, self.record.card(step, test))

    def _place(self, kind: str, step: int) -> Callable[[Path], Path | None]:
        return partial(place_of, self.run_dir, kind, step, self._count)

    def kept(self) -> str:
        """Which checkpoints there are to go back to, as a sentence."""
        best = self.validations.best
        kept = [] if self.saved is None else [f"checkpoints/last (step {self.saved})"]
        kept += [] if best is None else [f"checkpoints/best (step {best['step']})"]
        if not kept:
            return "No checkpoint had been written before."
        return f"Kept {'is' if len(kept) == 1 else 'are'} {' and '.join(kept)}."

"""What watches over a run: it counts steps that were left out and alarms, and says when enough is enough.

`grade.training.gate` leaves a step out, `grade.training.alarms` measures, `grade.training.rollback` goes back; what a
resumed run must know of all that is kept here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from grade.config import Config
from grade.errors import GradeError
from grade.rollout import Rollout
from grade.training.alarms import Alarms
from grade.training.record import RunRecord
from grade.training.skipped import keep_skipped


class Guard:
    """Counts, and decides what `guard` of the settings says.

    Attributes:
        rate_factor: what the learning rate is multiplied with, after the rollbacks so far.
        leaves_out: whether the run goes on after a step that is left out.
        rolls_back: whether an alarm takes the run back.
    """

    def __init__(self, config: Config, run_dir: Path, record: RunRecord, accelerator: Accelerator) -> None:
        self._settings = settings = config.guard
        self._seed, self._run_dir, self._record, self._accelerator = config.seed, run_dir, record, accelerator
        self._alarms = Alarms(settings)
        self._skipped: list[dict[str, Any]] = []
        self._in_a_row = 0
        self._raised = 0
        self._rollbacks: list[dict[str, Any]] = []
        self._said: set[str] = set()
        self._lines: list[str] = []
        self.rate_factor = 1.0
        self.leaves_out = settings.max_skipped > 1
        self.rolls_back = settings.action == "rollback"

    # -- steps -----------------------------------------------------------------------------------------------

    def may_leave_out(self) -> bool:
        """Whether the run goes on if this step is left out."""
        return self._in_a_row + 1 < self._settings.max_skipped

    def made(self, metrics: Mapping[str, float]) -> None:
        """A step counts: it is measured."""
        self._in_a_row = 0
        raised = self._alarms.hear(metrics)
        self._raised += len(raised)
        if raised:
            self.note()
        for name, words in raised.items():
            if self._settings.action == "warn" and name not in self._said:  # what else it does says so itself
                self._said.add(name)
                self._lines.append(f"warning: {words}: the policy may be collapsing.")

    def left_out(self, rollouts: Sequence[Rollout], step: int, reason: str, metrics: Mapping[str, float]) -> None:
        """A step does not count: what it takes to make it again is kept, and the run's record says so.

        Raises:
            GradeError: it cannot be written.
        """
        place = keep_skipped(
            self._run_dir, self._accelerator, rollouts, step=step, seed=self._seed, reason=reason, metrics=metrics
        )
        self._in_a_row += 1
        self._skipped.append({"step": step, "reason": reason})
        self._lines.append(f"warning: step {step}: the update was not made ({reason}). Its responses: {place}")
        self.note()

    def metrics(self) -> dict[str, float]:
        """The counts of the run so far, for the log."""
        counts = {"skipped_updates": len(self._skipped), "alarms": self._raised, "rollbacks": len(self._rollbacks)}
        return {f"guard/{name}": float(count) for name, count in counts.items()}

    def check(self, warn: Callable[[str], None], kept: str) -> None:
        """Say what there is to say of a step, and end the run after too many in a row that were left out.

        Args:
            kept: which checkpoints there are, as a sentence.

        Raises:
            GradeError: with what to do.
        """
        lines, self._lines = self._lines, []
        for line in lines:
            warn(line)
        if self._in_a_row >= self._settings.max_skipped:
            last, count = self._skipped[-1], self._in_a_row
            of = "" if count == 1 else f" of {count} steps in a row"
            raise GradeError(
                f"step {last['step']}: the update{of} was not made ({last['reason']}), and guard.max_skipped is "
                f"{self._settings.max_skipped}. {kept} The folder skipped/ has the responses. Mend what gives such "
                "numbers, or start another run with a lower train.learning_rate; for grade and grade-ste a higher "
                "method.tau_end helps too."
            )

    # -- alarms ----------------------------------------------------------------------------------------------

    def alarm(self) -> str | None:
        """What is to be acted on, as words; None where nothing is."""
        standing = self._alarms.standing()
        return "; ".join(standing.values()) if standing and self._settings.action != "warn" else None

    def beyond(self) -> bool:
        """Whether a run that would go back must not count on the policy as it is: a measure of the last step is beyond
        its bound, which may become an alarm."""
        return self.rolls_back and self._alarms.beyond()

    def may_roll_back(self) -> bool:
        """Whether a rollback is asked for and left."""
        return self.rolls_back and len(self._rollbacks) < self._settings.max_rollbacks

    def rolled_back(self, step: int, to: int, reason: str) -> int:
        """Note a rollback; its number, from 1."""
        self._alarms.forget()
        self._in_a_row = 0
        self.rate_factor *= self._settings.rollback_factor
        self._rollbacks.append({"from_step": step, "to_step": to, "reason": reason, "rate_factor": self.rate_factor})
        return len(self._rollbacks)

    def verdict(self, step: int, alarm: str, kept: str) -> str:
        """What to say of a run that an alarm ends."""
        if not self.rolls_back:
            why = "guard.action is stop"
        elif self.may_roll_back():
            why = "there is no earlier checkpoint within all bounds to go back to"
        else:
            why = f"guard.max_rollbacks is {self._settings.max_rollbacks}"
        return (
            f"after {step} steps: {alarm}. The run ends here, since {why}. {kept} Start another run with a lower "
            "train.learning_rate or a higher method.kl_coef, or go on as it is with --guard.action warn "
            "--train.resume auto."
        )

    # -- what is kept ----------------------------------------------------------------------------------------

    def note(self) -> None:
        """Say in the run's record what has happened so far."""
        content = {"skipped_updates": self._skipped, "alarms": self._raised, "rollbacks": self._rollbacks}
        if any(content.values()):
            self._record.note("guard", content)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {
            "skipped": self._skipped,
            "in_a_row": self._in_a_row,
            "raised": self._raised,
            "rollbacks": self._rollbacks,
            "recent": self._alarms.recent,
            "rate_factor": self.rate_factor,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`; from nothing, which checkpoints of earlier versions have, as a run that had
        none of it."""
        if state:
            self._skipped, self._in_a_row = list(state["skipped"]), state["in_a_row"]
            self._raised, self._rollbacks = state["raised"], list(state["rollbacks"])
            self._alarms.recent = dict(state["recent"])
            self.rate_factor = state["rate_factor"]

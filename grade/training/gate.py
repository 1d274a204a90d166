"""The one place where a step's updates are made: all of them, or, where a number is not finite, none."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

from grade.errors import NotFinite
from grade.methods.base import Method, Update
from grade.methods.metrics import step_metrics
from grade.rewards.base import MEND
from grade.rollout import Rollout
from grade.training.guard import Guard
from grade.training.optimization import Optimization, Weights
from grade.training.soundness import broken_measure


class UpdateGate:
    """Makes a method's updates, and leaves out a step of which a reward, KL, entropy, loss or gradient is not finite:
    weights, optimizer, method and reward are then, bit for bit, what they were before it.

    A method that takes one update a step asks for it when the step's sums are known, so that a bad one is never made
    and there is nothing to undo. Of a method that takes several (PPO, GRPO with passes or mini-batches) a later one may
    be bad: then those before it are undone too, since they belong to one step on one set of responses. For that, what
    is trained and its moments are copied before the first one.

    What decides is summed over processes, so all of them leave out the same steps.

    Args:
        guard: says whether a run goes on after such a step; else nothing is copied.
        learn: `Method.step` of the method, or what tries it again where memory ran out.
        refuse: ends the run, with when and why, where nothing was kept that could undo the updates made by then.
        copies: whether a step may take several updates.
    """

    def __init__(
        self,
        method: Method,
        learn: Callable[[list[Rollout], int, Update], dict[str, float]],
        optimization: Optimization,
        guard: Guard,
        refuse: Callable[[str, str], None],
        *,
        copies: bool,
    ) -> None:
        self._method, self._optimization, self._services = method, optimization, method.services
        self._learn, self._guard, self._refuse = learn, guard, refuse
        self._copies = guard.leaves_out and copies
        self._wrong: str | None = None
        self._made = 0
        self._weights: Weights | None = None
        self._services.before_update = self._look_at

    def step(self, rollouts: list[Rollout], step: int) -> tuple[dict[str, float], str | None]:
        """Let the method learn from a step's responses: its metrics, and why the step was left out, as words, once all
        of it is undone; None where it counts.

        Raises:
            NotFinite: a reward of somebody's own gave no finite number, and no further step may be left out.
            GradeError: it cannot be undone.
        """
        method = self._method
        self._wrong, self._made, self._weights = None, 0, None
        kept = copy.deepcopy((method.state_dict(), method.reward.state_dict(), method.kl_coef))
        self._optimization.begin(step)
        try:
            metrics = self._learn(rollouts, step, self.update)
        except NotFinite as error:
            if not self._guard.may_leave_out():
                raise
            self._optimization.clear()
            self._wrong = str(error).removesuffix(MEND).rstrip(". ")  # the run goes on: nobody has to start another
            unknown = dict.fromkeys(("loss", "reward", "kl", "entropy", "grad_norm"), math.nan)
            metrics = {**unknown, "tokens": self._services.totals(r.mask for r in rollouts).tokens}
        wrong, weights, self._weights = self._wrong or broken_measure(metrics), self._weights, None
        if wrong is None:
            return metrics, None
        if weights is not None:
            self._optimization.put_back(weights)
        elif self._made and self._guard.leaves_out:
            self._refuse(f"step {step}", wrong)
        of_method, of_reward, method.kl_coef = kept
        method.load_state_dict(of_method)
        method.reward.load_state_dict(of_reward)
        return {**metrics, "updates": 0}, wrong

    def update(self) -> float:
        """Sum gradients over processes, clip, step, clear; the norm of the policy's gradient before it was clipped, or
        NaN where the update was not made."""
        with self._services.phase("update"):
            if self._wrong is None:
                norms = self._optimization.clip()
                wrong = next((norm for norm in norms if not math.isfinite(norm)), None)
                if wrong is None:
                    if self._copies and self._weights is None:
                        self._weights = self._optimization.copied()
                    self._optimization.update()
                    self._made += 1
                    return norms[0]  # the policy's
                self._wrong = f"the gradient's norm is {wrong}"
            self._optimization.clear()
        return math.nan

    def _look_at(self, sums: dict[str, float]) -> None:
        if self._wrong is None:
            self._wrong = broken_measure(step_metrics(self._services.sum(sums)))

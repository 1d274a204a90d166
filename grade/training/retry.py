"""A step that runs out of memory is tried again in smaller parts, with the same result but for rounding.

What ran out decides what becomes smaller, from then on until the run ends: responses that are sampled together
(`generation.batch_size`), or that pass through the policy together (`train.batch_size`). Noise belongs to rows, and
every weight divides by a total of the whole step, so that parts only sum; mini-batches of PPO and GRPO keep the
responses that they share. Where a step ran out after sampling, its responses are kept.

Nothing is done twice: gradients are cleared, what the reward's functions said is kept, and all else that a step changes
(the optimizer, moments of the reward, baselines, the coefficient of the KL) it changes with its first update or after
it. A step that has taken an update (a later mini-batch or epoch) is not tried again: the run ends.

Several processes try again together. Before every sum over processes within a step they ask whether one of them has
run out; one that has asks in the place of what the others ask before. What reduces gradients is asked before too, and
not within. Sharded models reduce within their passes, where nobody can ask: they end as a run that has no retries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeVar

import torch
from accelerate import Accelerator, DistributedType
from torch import Tensor

from grade.errors import GradeError, RewardFailed
from grade.machine import is_out_of_memory
from grade.memory.peak import hand_back
from grade.memory.plan import MemoryPlan
from grade.methods.base import Method, Update
from grade.processes import failing_together, summed
from grade.rollout import Rollout
from grade.terminal import warn_once
from grade.training.responses import Responses, prompts_together

T = TypeVar("T")
_SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


class OutOfMemoryElsewhere(Exception):
    """Another process of the run has run out of memory, and all stop what they were doing."""


class Agreement:
    """Sums over processes, and whether one of them has run out of memory."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator, self._watching = accelerator, False
        self.possible = accelerator.distributed_type not in _SHARDED

    def reduce(self, values: Tensor) -> Tensor:
        """The sum over processes, on CPU (`grade.processes.summed`).

        Raises:
            OutOfMemoryElsewhere: while a step is watched, if another process has run out of memory.
        """
        self._ask()
        return summed(self._accelerator, values)

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """`grade.processes.failing_together`; raises as `reduce` does."""
        with failing_together(self._accelerator):
            try:
                yield
            except RewardFailed:
                self._ask()
                raise
            self._ask()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Behind the block, running out of memory inside it in one process is known in all.

        Raises:
            OutOfMemoryElsewhere: in the processes that have not run out themselves.
        """
        self._watching = self.possible
        try:
            yield
            self._ask()
        except (MemoryError, RuntimeError) as error:
            if is_out_of_memory(error):
                self._ask(out=True)
            raise
        finally:
            self._watching = False

    @contextmanager
    def updating(self) -> Iterator[None]:
        """Around an update, which all processes take or none: inside it they reduce without asking."""
        self._ask()
        watched, self._watching = self._watching, False
        yield
        self._watching = watched  # and not after an error: the others may be waiting in the update

    def _ask(self, *, out: bool = False) -> None:
        if not self._watching or self._accelerator.num_processes == 1:
            return
        number = summed(self._accelerator, torch.tensor(float(out), dtype=torch.float64))
        if number > 0 and not out:
            raise OutOfMemoryElsewhere


class Retry:
    """Tries the parts of a step, again where memory ran out and they can be made smaller.

    Args:
        responses: which it samples.
        memory: words for a run that cannot go on.
        clear: drops the gradients.
    """

    def __init__(
        self, agreement: Agreement, method: Method, responses: Responses, memory: MemoryPlan, clear: Callable[[], None]
    ) -> None:
        self._agreement, self._method, self._responses = agreement, method, responses
        self._memory, self._clear = memory, clear
        self._updated = False

    def rollouts(self, step: int, sample: Callable[[int], Iterable[Rollout]]) -> list[Rollout]:
        """What `sample` gives for a step.

        Raises:
            GradeError: memory ran out, and no fewer can be sampled together.
        """
        self._updated = False
        return self._tried(step, lambda: list(sample(step)), self._sample_fewer)

    def step(self, rollouts: list[Rollout], step: int, update: Update) -> dict[str, float]:
        """`Method.step`.

        Raises:
            GradeError: memory ran out, and no fewer can pass together, or an update had been taken.
        """
        self._updated = False
        if self._method.reward.judges():  # once, for all tries
            with self._method.services.phase("score"):
                rollouts = self._method.asked(rollouts)

        def once() -> float:
            with self._agreement.updating():
                self._updated = True
                return update()

        longest = max(map(len, rollouts))
        return self._tried(
            step, lambda: self._method.step(rollouts, step, once), lambda when: self._pass_fewer(when, longest)
        )

    def _tried(self, step: int, work: Callable[[], T], smaller: Callable[[str], str | None]) -> T:
        """The work's result.

        Args:
            smaller: makes its parts smaller, given where memory ran out; what to say of it, None where it cannot.
        """
        while True:
            try:
                with self._agreement.watching():
                    return work()
            except (MemoryError, RuntimeError, OutOfMemoryElsewhere) as error:
                if not isinstance(error, OutOfMemoryElsewhere) and not is_out_of_memory(error):
                    raise
                may = self._agreement.possible and self._method.repeatable and not self._updated
                line = smaller(f"step {step}") if may else None
                if line is None:
                    self._give_up(step, error)
            # Here, where the error no longer holds what was being computed.
            self._clear()
            hand_back()
            warn_once(f"warning: {line} The result is the same but for rounding.")

    def _sample_fewer(self, when: str) -> str | None:
        responses = self._responses
        if responses.source is not None:
            return None
        generation, share = responses.generation, responses.per_step // responses.processes
        copies = generation.samples_per_prompt
        now = min(prompts_together(generation, share), share // copies)
        for prompts in range(now // 2, 0, -1):
            if self._method.same_minibatches(prompts * copies, now * copies):
                responses.generation = replace(generation, batch_size=prompts * copies)
                return (
                    f"out of memory in sampling in {when}: it is tried again, and the run goes on, with "
                    f"{prompts * copies} responses at a time instead of {now * copies} (generation.batch_size)."
                )
        return None

    def _pass_fewer(self, when: str, longest: int) -> str | None:
        """`longest` is the number of responses of the largest rollout."""
        now = min(self._method.together, longest)
        if now == 1:
            return None
        self._method.together = now // 2
        return (
            f"out of memory in {when}: it is tried again, and the run goes on, with micro-batches of {now // 2} "
            f"instead of {now} (train.batch_size)."
        )

    def _give_up(self, step: int, error: Exception) -> None:
        """End in words, with the sizes that it has come to.

        Raises:
            GradeError: always.
        """
        if isinstance(error, OutOfMemoryElsewhere):
            raise GradeError(
                f"another process ran out of memory in step {step}, and says what to change. What was saved is kept."
            ) from error
        config = self._memory.config
        train = replace(config.train, batch_size=min(config.train.batch_size, self._method.together))
        now = replace(config, train=train, generation=self._responses.generation)
        with replace(self._memory, config=now).explained(f"step {step}", "train"):
            raise error

"""What a run says of its memory before the first step, whether it checkpoints, and what to change where memory ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from grade.config import Config
from grade.errors import GradeError, reason_of
from grade.memory.estimate import Estimate, estimate, size_of
from grade.model.policy import Policy
from grade.rewards.base import Reward

_HOPELESS = 2.0  # times what is free: the estimate may be a half too high, and other programs may give memory back
_SHARE = 0.8  # of what is free that a run may take by the estimate: allocators lose some to fragments


@dataclass(frozen=True)
class MemoryPlan:
    """What a run will need, what there is, and whether it checkpoints.

    Args:
        free: bytes; None where the platform does not tell.
        chunk_bytes: of the head's logits.
    """

    config: Config
    estimate: Estimate
    free: int | None
    checkpoint: bool
    chunk_bytes: int

    @property
    def line(self) -> str:
        """What the run says before its first step."""
        method, needed = self.config.method, self.estimate.more(self.checkpoint)
        auto = " (auto)" if method.activation_checkpointing == "auto" else ""
        free = "free memory unknown" if self.free is None else f"{size_of(self.free)} free"
        line = (
            f"memory: {self.estimate.sentence(self.checkpoint)}; {free}; activation checkpointing "
            f"{'on' if self.checkpoint else 'off'}{auto}"
        )
        if self.free is not None and needed > self.free:
            section = "evaluation" if self.estimate.largest(self.checkpoint) == "evaluation" else "train"
            line += f". That may not fit. {self._change(section)}"
        return line

    def check(self, any_process: Callable[[bool], bool] = bool) -> None:
        """Refuse, before any work, a run that cannot fit.

        Args:
            any_process: whether something holds on any process, so that all refuse or none.

        Raises:
            GradeError: the estimate is more than twice what is free.
        """
        hopeless = self.free is not None and self.estimate.more(self.checkpoint) > _HOPELESS * self.free
        if any_process(hopeless):
            section = "evaluation" if self.estimate.largest(self.checkpoint) == "evaluation" else "train"
            needed = self.estimate.sentence(self.checkpoint)
            raise GradeError(
                f"the run would need {needed}, and {size_of(self.free or 0)} are free: that cannot fit. "
                f"{self._change(section)}"
            )

    @contextmanager
    def explained(self, what: str, section: str) -> Iterator[None]:
        """Turn running out of memory into what to change.

        Args:
            what: such as "step 3".
            section: "train" or "evaluation", whose settings decide.

        Raises:
            GradeError: memory ran out.
        """
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise GradeError(
                f"out of memory in {what}, which was estimated to need {self.estimate.sentence(self.checkpoint)}. "
                f"{self._change(section)} What was saved is kept. ({reason_of(error)})"
            ) from error

    def _change(self, section: str) -> str:
        """The settings that lower the peak of training or evaluation, those first that leave the result what it is."""
        config, train, generation = self.config, self.config.train, self.config.generation
        responses, chunk = train.batch_size * train.accumulation_steps, self.chunk_bytes // 2**20
        changes: list[str] = []
        if section == "train":
            if not self.checkpoint and self.estimate.checkpointed:
                changes.append("method.activation_checkpointing to true")
            if train.batch_size > 1:
                changes.append(
                    f"train.batch_size below {train.batch_size} (with train.accumulation_steps above "
                    f"{train.accumulation_steps} for the same gradient)"
                )
            together = min(generation.batch_size or responses, responses)
            if together > generation.samples_per_prompt:
                first = 0 if self.estimate.largest(self.checkpoint) == "rollout" else len(changes)
                changes.insert(first, f"generation.batch_size below {together}")
        elif config.evaluation.batch_size > 1:
            changes.append(f"evaluation.batch_size below {config.evaluation.batch_size}")
        a_tenth = 3 * self.chunk_bytes > 0.1 * self.estimate.total(self.checkpoint)
        if chunk > 16 and a_tenth:
            changes.append(f"method.head_chunk_mib below {chunk}")
        changes.append(f"generation.max_new_tokens below {generation.max_new_tokens}")
        return f"Set {', '.join(changes[:-1])} or {changes[-1]}." if changes[1:] else f"Set {changes[0]}."


def plan(
    policy: Policy, reward: Reward, config: Config, prompt_length: int, free: int | None,
    any_process: Callable[[bool], bool] = bool, evaluated: int | None = None,
) -> MemoryPlan:
    """`estimate`, and decide where method.activation_checkpointing is `auto`: on if the run would take more than 80 %
    of what is free on any process, and less with it."""
    found, asked = estimate(policy, reward, config, prompt_length, evaluated), config.method.activation_checkpointing
    if asked == "auto":
        tight = free is not None and found.more(checkpoint=False) > _SHARE * free
        asked = any_process(tight and found.total(checkpoint=True) < found.total(checkpoint=False))
    return MemoryPlan(config, found, free, asked, config.method.head_chunk_bytes(policy.device.type))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it says that memory ran out, on any device."""
    # oneDNN has no other word for it.
    words = ("DefaultCPUAllocator", "can't allocate memory", "could not create a primitive", "error: out of memory")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(word in str(error) for word in words)

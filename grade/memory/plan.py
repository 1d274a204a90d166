"""Whether a run fits into memory and recomputes its activations: decided by what its steps hold, before the first one.

A trial runs a step without its update, and a batch of an evaluation, on few short responses. Nothing in them grows
faster than the square of the length and the number of responses, so a small trial bounds a large one. Where that bound
is not well below what is free, trials grow to the sizes of the run; what the next will hold is foreseen from those
before, so that none is tried that would not fit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

from grade.config import Config
from grade.errors import GradeError, reason_of
from grade.machine import is_out_of_memory
from grade.memory.peak import hand_back
from grade.planning.memory import SHARE

Peaks = dict[str, float]
"""Bytes beside what is loaded, by phase: "rollout", "passes" (that training makes over what was sampled) and
"evaluation"."""
Measurement = Callable[[int, int], tuple[Peaks, float]]
"""measurement(length, width) by a trial: (peaks with responses of `length` tokens, about `width` of them together, how
many times as many the run has)."""

SHORTEST = 16
"""Tokens of the shortest trial: from here on, sampling reads its weights as it does in longer ones."""
NARROWEST = 8
"""Responses together in the first trial."""
_GIB = 2**30
_WHERE = {"rollout": "in sampling ", "passes": "", "evaluation": "in evaluation "}


@dataclass(frozen=True)
class Sizes:
    """What the memory of a run depends on.

    Args:
        prompt, response: P and S, tokens of the longest.
        batches: B by phase, responses at a time.
        chunk_bytes: of the head's logits.
        can_recompute: whether the architecture lets activations be recomputed.
    """

    prompt: int
    response: int
    batches: dict[str, int]
    chunk_bytes: int
    can_recompute: bool


@dataclass(frozen=True)
class Need:
    """What trials found: `how` is "about" if in full length, "at most" if bounded, "more than" if memory ran out, or
    was foreseen to before all responses passed together."""

    peaks: Peaks
    how: str = "about"

    @property
    def total(self) -> float:
        return max(self.peaks.values())

    @property
    def largest(self) -> str:
        """The phase whose settings decide; training first, of equals."""
        return max(sorted(self.peaks, key=lambda name: name != "passes"), key=lambda name: self.peaks[name])

    def fits(self, free: float | None) -> bool:
        """Whether it is within `free` bytes, None where the platform does not tell; what ran out does not fit."""
        return self.how != "more than" and (free is None or self.total <= free)


def measured(trial: Measurement, longest: int, free: int | None) -> Need:
    """What the run needs, by as small a trial as tells.

    Args:
        longest: tokens of its responses.
        free: bytes; None where the platform does not tell, and nothing is to be decided.
    """
    first, *longer = _lengths(longest)
    width, seen, need = NARROWEST, dict[int, Peaks](), Need({"passes": 0})
    try:
        while True:  # at the shortest length, until all responses of the run pass together
            seen[width], times = trial(first, width)
            need = _times(seen[width], times * (longest / first) ** 2)
            if free is None or need.fits(SHARE * free):
                return need
            if times <= 1:
                break
            width = min(4 * width, math.ceil(times * width))
            if len(seen) >= 2 and not Need(foreseen(seen, width)).fits(free):
                return Need(foreseen(seen, width), "more than")
        seen = {first: seen[width]}
        for length in longer:
            if len(seen) >= 3 and not Need(foreseen(seen, length)).fits(free):
                return Need(foreseen(seen, longest))
            seen[length], _ = trial(length, width)
            need = _times(seen[length], (longest / length) ** 2)
            if need.fits(SHARE * free):
                break
        return Need(seen[longest]) if longest in seen else need
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        hand_back()
        return Need({need.largest: free or 0}, "more than")


def _times(peaks: Peaks, factor: float) -> Need:
    return Need({name: size * factor for name, size in peaks.items()}, "at most" if factor > 1 else "about")


def _lengths(longest: int) -> list[int]:
    """Of trials: a short one, others that tell how memory grows from there, twice as long each time, the longest."""
    first = max(longest // 8, SHORTEST)
    top = max(first, 2 * SHORTEST)
    lengths = (first, top // 2, 3 * top // 4, top, 2 * top, 4 * top)
    return [*dict.fromkeys(length for length in lengths if length < longest), longest]


def foreseen(seen: dict[int, Peaks], length: int) -> Peaks:
    """The peaks at `length` by the polynomial through those at the last three lengths; no less than the longest's."""
    points = sorted(seen)[-3:]

    def at(name: str) -> float:
        return sum(
            seen[there][name] * math.prod((length - other) / (there - other) for other in points if other != there)
            for there in points
        )

    return {name: max(size, at(name)) for name, size in seen[points[-1]].items()}


@dataclass(frozen=True)
class MemoryPlan:
    """What a run will need, what there is, and whether it recomputes activations.

    Args:
        free: bytes; None where the platform does not tell.
    """

    config: Config
    sizes: Sizes
    need: Need
    free: int | None
    recompute: bool

    @property
    def line(self) -> str:
        """What the run says before its first step."""
        auto = " (auto)" if self.config.method.activation_checkpointing == "auto" else ""
        free = "free memory unknown" if self.free is None else f"{size_of(self.free)} free"
        tight = self.free is not None and not self.need.fits(SHARE * self.free)
        return (
            f"memory: {self.sentence}; {free}; activation checkpointing {'on' if self.recompute else 'off'}{auto}"
            f"{f'. That is tight. {self._change()}' if tight else ''}"
        )

    @property
    def sentence(self) -> str:
        """Such as `about 1.3 GiB beside what is loaded, at B = 8, P = 32, S = 64, k = 256 (rollout 200 MiB, ...)`."""
        need, sizes = self.need, self.sizes
        parts = ", ".join(f"{name} {size_of(size)}" for name, size in need.peaks.items())
        return (
            f"{need.how} {size_of(need.total)} beside what is loaded, {_WHERE[need.largest]}at "
            f"B = {sizes.batches[need.largest]:,}, P = {sizes.prompt:,}, S = {sizes.response:,}, "
            f"k = {self.config.generation.top_k:,} ({parts})"
        )

    def check(self, any_process: Callable[[bool], bool] = bool) -> None:
        """Refuse, before any work, a run that cannot fit.

        Args:
            any_process: whether something holds on any process, so that all refuse or none.

        Raises:
            GradeError: it needs more than is free.
        """
        if any_process(not self.need.fits(self.free)):
            free = "trials ran out of memory" if self.free is None else f"{size_of(self.free)} are free"
            raise GradeError(f"the run would need {self.sentence}, and {free}: that cannot fit. {self._change()}")

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
                f"out of memory in {what}, where trials had needed {self.sentence}. {self._change(section)} "
                f"What was saved is kept. ({reason_of(error)})"
            ) from error

    def _change(self, section: str | None = None) -> str:
        """The settings that lower the peak of training or evaluation (None: of what is largest), those first that leave
        the result what it is."""
        config, train, generation = self.config, self.config.train, self.config.generation
        chunk = self.sizes.chunk_bytes // 2**20
        together = min(self.sizes.batches["rollout"], generation.batch_size or self.sizes.batches["rollout"])
        changes: list[str] = []
        if (section or self.need.largest) == "evaluation":
            if config.evaluation.batch_size > 1:
                changes.append(f"evaluation.batch_size below {config.evaluation.batch_size}")
        else:
            if not self.recompute and self.sizes.can_recompute:
                changes.append("method.activation_checkpointing to true")
            if train.batch_size > 1:
                changes.append(
                    f"train.batch_size below {train.batch_size} (with train.accumulation_steps above "
                    f"{train.accumulation_steps} for the same gradient)"
                )
            if together > generation.samples_per_prompt:
                first = 0 if self.need.largest == "rollout" else len(changes)
                changes.insert(first, f"generation.batch_size below {together}")
        if chunk > 16 and 3 * self.sizes.chunk_bytes > 0.1 * self.need.total:
            changes.append(f"method.head_chunk_mib below {chunk}")
        changes.append(f"generation.max_new_tokens below {generation.max_new_tokens}")
        return f"Set {', '.join(changes[:-1])} or {changes[-1]}." if changes[1:] else f"Set {changes[0]}."


def size_of(size: float) -> str:
    """Bytes in GiB, or in MiB where they are less."""
    return f"{size / _GIB:.1f} GiB" if size >= _GIB else f"{math.ceil(size / 2**20)} MiB"


def plan(
    trial: Callable[..., tuple[Peaks, float]],
    config: Config,
    sizes: Sizes,
    free: int | None,
    any_process: Callable[[bool], bool] = bool,
    failing_together: Callable[[], AbstractContextManager] = nullcontext,
) -> MemoryPlan:
    """Run trials, and decide where method.activation_checkpointing is `auto`: on if the run would take more than 80 %
    of what is free on any process, and less with it or nobody knows how much without.

    Args:
        trial: a `Measurement` that also takes `recompute`, whether activations are.
        failing_together: a context behind which a reward that has failed in one process has failed in all.
    """
    recompute = config.method.activation_checkpointing is True
    with failing_together():
        need = measured(partial(trial, recompute=recompute), sizes.response, free)
    if config.method.activation_checkpointing == "auto" and sizes.can_recompute:
        if any_process(not need.fits(None if free is None else SHARE * free)):
            with failing_together():
                less = measured(partial(trial, recompute=True), sizes.response, free)
            if any_process(need.how == "more than" or less.total < need.total):
                need, recompute = less, True
    return MemoryPlan(config, sizes, need, free, recompute)

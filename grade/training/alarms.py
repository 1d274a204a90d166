"""Alarms of a policy that collapses: measures of a training step that stay beyond a bound for several steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from grade.config import GuardConfig


class Watch(NamedTuple):
    """What is watched.

    Args:
        bound: its setting in `guard`.
        words: what the measure is.
        measure: of a step's metrics.
        below: whether an alarm is of values below the bound, and not above.
    """

    bound: str
    words: str
    measure: Callable[[Mapping[str, float]], float]
    below: bool


WATCHES = (
    Watch("min_unique_token_ratio", "unique_token_ratio", lambda m: m["unique_token_ratio"], True),
    Watch("min_entropy", "entropy", lambda m: m["entropy"], True),
    Watch("max_kl", "kl", lambda m: m["kl"], False),
    Watch("max_clipped_ratio", "share of responses without an end", lambda m: 1 - m["eos_rate"], False),
)


class Alarms:
    """The last values of what is watched, and what they say under the settings in force.

    All values are kept, not only those beyond a bound: a resumed run may have other bounds.

    Attributes:
        recent: by the name of the bound, the values of the last `alarm_steps` steps; what a checkpoint keeps.
    """

    def __init__(self, settings: GuardConfig) -> None:
        self._settings = settings
        self.recent: dict[str, list[float]] = {}

    def hear(self, metrics: Mapping[str, float]) -> dict[str, str]:
        """Take in a step that counts; the alarms that it raises, as `standing` gives them. One that stands already is
        not raised again before a step is within the bound."""
        before = self.standing()
        for watch in WATCHES:
            values = [*self.recent.get(watch.bound, []), watch.measure(metrics)]
            self.recent[watch.bound] = values[-self._settings.alarm_steps :]
        return {name: words for name, words in self.standing().items() if name not in before}

    def forget(self) -> None:
        """Begin anew."""
        self.recent = {}

    def standing(self) -> dict[str, str]:
        """Alarms by the name of the bound, as words."""
        steps, found = self._settings.alarm_steps, {}
        for watch in WATCHES:
            values = self.recent.get(watch.bound, [])[-steps:]
            if len(values) == steps and all(self._beyond(watch, value) for value in values):
                side = "below" if watch.below else "above"
                over = f"over {steps} steps" if steps > 1 else "in a step"
                found[watch.bound] = (
                    f"{watch.words} is {side} {getattr(self._settings, watch.bound):g} (guard.{watch.bound}) {over}, "
                    f"{values[-1]:.3g} in the last"
                )
        return found

    def beyond(self) -> bool:
        """Whether any measure of the last step was beyond its bound."""
        return any(self._beyond(watch, values[-1]) for watch in WATCHES if (values := self.recent.get(watch.bound, [])))

    def _beyond(self, watch: Watch, value: float) -> bool:
        bound = getattr(self._settings, watch.bound)
        return bound is not None and (value < bound if watch.below else value > bound)

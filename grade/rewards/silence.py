"""Functions of a reward that apply to no response: each counts as 0, and a run would learn nothing without a word."""

from __future__ import annotations

from collections.abc import Mapping

from grade.errors import RewardFailed
from grade.rewards.base import Reward
from grade.terminal import warn_once

LONGEST = 5
"""Steps in a row in which a reward may say nothing at all."""
_FIX = (
    "It returns None (of a RewardFunction: NaN) where it does not apply: correct what it looks for in prompts, "
    "completions or columns"
)


def silent_line(name: str, where: str) -> str:
    """What to say of a function that applies to no response of `where`."""
    return f"warning: the reward function {name} applies to no response of {where}, and counts as 0. {_FIX}."


class Silence:
    """Listens for functions that say nothing over a run's steps, which it counts anew where a run goes on.

    Args:
        reward: of the run.
    """

    def __init__(self, reward: Reward):
        self.alone = len(reward.summands()) == len(reward.judges())  # nothing else is there to learn from
        self.named: set[str] = set()
        self.steps = 0

    def hear(self, applied: Mapping[str, float]) -> None:
        """Warn of a function, the first time that it applies to nothing.

        Args:
            applied: to how many of a step's responses each function applies, over all processes.

        Raises:
            RewardFailed: the whole reward has said nothing for `LONGEST` steps in a row.
        """
        silent = [name for name, count in applied.items() if not count]
        for name in silent:
            if name not in self.named:
                warn_once(silent_line(name, "a step"))
        self.named.update(silent)
        self.steps = self.steps + 1 if self.alone and len(silent) == len(applied) else 0
        if self.steps >= LONGEST:
            raise RewardFailed(
                f"the reward applied to no response of {self.steps} steps in a row ({', '.join(silent)}): there is "
                f"nothing to learn from. {_FIX}, and start another run."
            )

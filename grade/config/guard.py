"""The settings of what watches over a run: updates that are skipped, and alarms of a policy that collapses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from grade.config.bounds import COUNT, WEIGHT, setting
from grade.errors import GradeError

BOUNDS = ("min_unique_token_ratio", "min_entropy", "max_kl", "max_clipped_ratio")
"""The settings that are bounds of alarms."""


@dataclass
class GuardConfig:
    """What watches over training: steps whose numbers are not finite, and a policy that collapses."""

    max_skipped: int = setting(3, ge=1, le=COUNT)
    """A step whose loss, reward, KL, entropy or gradient is not finite is left out: nothing of it reaches the weights.
    The run stops after this many such steps in a row; 1: after the first."""
    min_unique_token_ratio: float | None = setting(0.1, ge=0, le=1)
    """Alarm while distinct tokens over tokens of a response, mean over a step's, are below this; null: no such alarm.
    """
    min_entropy: float | None = setting(0.01, ge=0, le=WEIGHT)
    """Alarm while the policy's entropy, nats per token, is below this; null: no such alarm."""
    max_kl: float | None = setting(10.0, ge=0, le=WEIGHT)
    """Alarm while the KL to the reference, nats per token, is above this; null: no such alarm."""
    max_clipped_ratio: float | None = setting(None, ge=0, le=1)
    """Alarm while the share of responses that reach generation.max_new_tokens without an end is above this; null: no
    such alarm."""
    alarm_steps: int = setting(5, ge=1, le=10_000)
    """Steps in a row in which a measure is beyond its bound before that is an alarm."""
    action: Literal["warn", "stop", "rollback"] = "warn"
    """What an alarm does. `warn`: it is said and counted. `stop`: the run is saved and ends, with exit code 3.
    `rollback`: the run goes back to its last checkpoint within all bounds, and on from there with a lower learning
    rate."""
    rollback_factor: float = setting(0.5, ge=1e-3, le=1)
    """The learning rate is multiplied by this with every rollback."""
    max_rollbacks: int = setting(3, ge=1, le=1000)
    """Rollbacks of a run; the next alarm stops it."""


def check_guard(guard: GuardConfig, *, ignore_eos: bool, source: str | None) -> None:
    """Refuse what cannot be watched or done.

    Args:
        ignore_eos: generation.ignore_eos.
        source: rollout.source.

    Raises:
        GradeError: naming the setting, the reason and the fix.
    """
    if guard.max_clipped_ratio is not None and ignore_eos:
        raise GradeError(
            "guard.max_clipped_ratio watches responses that do not end, and with generation.ignore_eos none ends. Set "
            "the first to null."
        )
    if guard.action != "warn" and all(getattr(guard, name) is None for name in BOUNDS):
        names = ", ".join(f"guard.{name}" for name in BOUNDS)
        raise GradeError(
            f"guard.action is {guard.action}, but there is nothing that could raise an alarm: {names} are null. Set "
            "one of them, or guard.action to warn."
        )
    if guard.action == "rollback" and source is not None:
        raise GradeError(
            "guard.action=rollback makes steps again, but the responses of rollout.source are read once. Use stop or "
            "warn."
        )

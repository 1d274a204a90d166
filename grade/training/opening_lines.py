"""What a run says before its first step: what it raises, and what else decides what its numbers mean."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from grade.config import Config
from grade.model.end_of_sequence import how_responses_end
from grade.model.policy import Policy
from grade.rewards.base import Reward


def opening_lines(config: Config, policy: Policy, reward: Reward) -> list[str]:
    """Lines for the terminal: what a higher reward means, how responses end, whether a model's own code runs."""
    lines = [f"reward: {reward.raises} is raised", how_responses_end(config.generation, policy)]
    if config.model.trust_remote_code:
        lines.append(f"model.trust_remote_code: code that comes with {config.model.name} may run here")
    return lines


def head_lines(report: Mapping[str, Any]) -> list[str]:
    """The held-out accuracies in the report of a reward head's training; no lines of a reward without one."""
    return [
        f"reward head: held-out accuracy on the first {text}"
        + " (the length it will judge)" * (text == f"{report['judged_length']} tokens")
        + f": {value:.3f} of {report['held_out']} reviews"
        for text, value in report.get("accuracy", {}).items()
    ]

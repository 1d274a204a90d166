"""What a run says before its first step: what it raises, and what else decides what its numbers mean."""

from __future__ import annotations

from grade.config import Config
from grade.model.end_of_sequence import how_responses_end


def raised(config: Config, task, reward) -> str:
    """What a higher reward means."""
    labels = getattr(task, "labels", None)
    if not reward.differentiable:
        return f"the score of task.name={config.task.name}"
    if config.reward.model is not None:
        return reward.raises
    return "the probability of a positive review" if labels is None else f"the probability of the label {labels}"


def opening_lines(config: Config, task, policy, reward) -> list[str]:
    """Lines for the terminal: what a higher reward means, how responses end, whether a model's own code runs."""
    lines = [f"reward: {raised(config, task, reward)} is raised", how_responses_end(config, policy)]
    if config.model.trust_remote_code:
        lines.append(f"model.trust_remote_code: code that comes with {config.model.name} may run here")
    return lines

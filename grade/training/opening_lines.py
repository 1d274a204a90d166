"""What a run says before its first step: what it raises, and what else decides what its numbers mean."""

from __future__ import annotations

from typing import Any

from grade.config import Config
from grade.model.end_of_sequence import how_responses_end
from grade.model.policy import Policy


def opening_lines(config: Config, task: Any, policy: Policy, reward: Any) -> list[str]:
    """Lines for the terminal: what a higher reward means, how responses end, whether a model's own code runs."""
    labels = getattr(task, "labels", None)
    if not reward.differentiable:
        raised = f"the score of task.name={config.task.name}"
    elif config.reward.model is not None:
        raised = reward.raises
    else:
        raised = "the probability of a positive review" if labels is None else f"the probability of the label {labels}"
    lines = [f"reward: {raised} is raised", how_responses_end(config, policy)]
    if config.model.trust_remote_code:
        lines.append(f"model.trust_remote_code: code that comes with {config.model.name} may run here")
    return lines

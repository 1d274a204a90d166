"""The reward that the settings ask for. A new kind is named in `PROGRAMS`, or gets a line in `load_reward`."""

from __future__ import annotations

from collections.abc import Callable

from transformers import PreTrainedTokenizerBase

from grade.config import RewardConfig
from grade.model.policy import Policy
from grade.rewards.base import Reward
from grade.rewards.classifier import check_classifier, load_classifier
from grade.rewards.countdown import CountdownReward
from grade.rewards.head_training import HeadTraining
from grade.rewards.probe import probe_classifier
from grade.rewards.shared import SharedReward
from grade.tasks.base import Task

PROGRAMS: dict[str, Callable[..., Reward]] = {"countdown": CountdownReward}
"""Of tasks that are judged by a program, by task.name; made from the policy and the task."""


def check_reward(settings: RewardConfig, tokenizer: PreTrainedTokenizerBase, *, judged: int) -> None:
    """Find mistakes in `reward.model` before any weights are read: the policy may be large.

    Raises:
        GradeError: it cannot be found, has another vocabulary, a context that is too short, or no such class.
    """
    if settings.model is not None:
        check_classifier(settings.model, tokenizer, judged=judged, positive_label=settings.positive_label)


def load_reward(settings: RewardConfig, policy: Policy, task: Task, *, judged: int, output_dir: str) -> Reward:
    """The task's own program, a classifier, or the trained head (trained now if there is none yet).

    Args:
        judged: tokens of the text that it will judge in training.
        output_dir: of the config, for heads without a `reward.path`.
    """
    if task.name in PROGRAMS:
        return PROGRAMS[task.name](policy, task)
    if settings.model is not None:
        classifier = load_classifier(
            settings.model, policy, positive_label=settings.positive_label, reads=settings.input, judged=judged
        )
        probe_classifier(classifier, settings.model, judged)
        return classifier
    training = HeadTraining(settings, judged, output_dir, policy, task)
    head = training.head()
    raised = f"the probability of the label {task.labels}" if head.label_type == "classes" and task.labels else None
    return SharedReward(policy, head, settings.input, raises=raised, folder=training.folder)

"""The reward that a config asks for."""

from __future__ import annotations

from grade.config import Config, judged_length
from grade.model.policy import Policy
from grade.rewards.countdown import CountdownReward
from grade.rewards.head_training import load_or_train_head
from grade.rewards.probe import probe_classifier
from grade.rewards.reward import SharedReward, check_classifier, load_classifier
from grade.tasks.countdown import CountdownTask


def check_reward(config: Config, tokenizer) -> None:
    """Find mistakes in `reward.model` before any weights are read: the policy may be large.

    Raises:
        GradeError: it cannot be found, has another vocabulary, a context that is too short, or no such class.
    """
    if config.reward.model is not None:
        check_classifier(
            config.reward.model, tokenizer, judged=judged_length(config), positive_label=config.reward.positive_label
        )


def load_reward(config: Config, policy: Policy, task):
    """The task's own program, a classifier, or the trained head (trained now if there is none yet)."""
    if isinstance(task, CountdownTask):
        return CountdownReward(policy, task)
    if config.reward.model is not None:
        reward = load_classifier(
            config.reward.model, policy, positive_label=config.reward.positive_label, reads=config.reward.input,
            judged=judged_length(config),
        )
        probe_classifier(reward, config.reward.model, judged_length(config))
        return reward
    return SharedReward(policy, load_or_train_head(config, policy, task), config.reward.input)

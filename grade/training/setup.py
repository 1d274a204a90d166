"""What every command that runs a model loads first: tokenizer, data, policy and reward."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from grade.config import Config, judged_length
from grade.errors import GradeError
from grade.model.fingerprint import changed_inputs, check_made_from, policy_inputs, refuse_given
from grade.model.loading import load_policy, load_tokenizer
from grade.model.policy import Policy
from grade.processes import everywhere, main_process_first
from grade.rewards.base import Reward
from grade.rewards.head_training import needs_labels, with_kept_head
from grade.rewards.loading import check_reward, load_reward
from grade.tasks import load_task
from grade.tasks.base import Task


class SetUp(NamedTuple):
    """What `set_up` has loaded."""

    tokenizer: PreTrainedTokenizerBase
    task: Task
    policy: Policy
    reward: Reward


def set_up(
    config: Config,
    accelerator: Accelerator,
    *,
    policy_config: Config | None = None,
    run_dir: Path | None = None,
    before_policy: Callable[[PreTrainedTokenizerBase, Task], object] = lambda tokenizer, task: None,
    before_reward: Callable[[Policy], object] = lambda policy: None,
) -> SetUp:
    """Load what a config names, quick mistakes first; a reward head that is missing is trained, by the main process.

    Args:
        policy_config: loads the policy instead, for longer responses than the config has.
        run_dir: of a run, whose own reward head is used if it kept one.
        before_policy: refuses tokenizer or task before a model is read.
        before_reward: refuses the policy before a head is trained.

    Raises:
        GradeError: something cannot be found or used, with the setting that names it.
    """
    if run_dir is not None:
        refuse_given(run_dir)
    judged = judged_length(config.task, config.reward, config.generation)
    tokenizer = load_tokenizer(config.model)
    check_reward(config.reward, tokenizer, judged=judged)
    task = load_task(config.task, config.tokenizer, labels=needs_labels(config.task, config.reward))
    before_policy(tokenizer, task)
    policy = load_policy(policy_config or config, tokenizer, accelerator.device)
    if run_dir is not None:
        check_made_from(run_dir, policy_inputs(policy))
    before_reward(policy)
    with main_process_first(accelerator):
        settings = config.reward if run_dir is None else with_kept_head(config.reward, run_dir)
        reward = load_reward(
            settings, policy, task, judged=judged, output_dir=config.output_dir, generation=config.generation
        )
    return SetUp(tokenizer, task, policy, reward)


def check_same_inputs(accelerator: Accelerator, inputs: Mapping[str, Any]) -> None:
    """Refuse processes of one run that do not read the same.

    Args:
        inputs: the fingerprint of what this process reads.

    Raises:
        GradeError: in every process, with what differs.
    """
    main, *others = everywhere(accelerator, inputs)
    for number, other in enumerate(others, 1):
        changed = changed_inputs(main, other, number)
        if changed:
            raise GradeError(
                f"the processes do not have the same inputs, but different ones: {changed} Give all of them the same, "
                "with random numbers seeded alike."
            )

"""`grade reward`: train the reward head of a config by itself."""

from __future__ import annotations

from rich.console import Console

from grade.config import Config, judged_length, trains_head
from grade.config.tasks import JUDGED_BY_PROGRAM
from grade.errors import GradeError
from grade.model.loading import load_policy, load_tokenizer
from grade.processes import make_accelerator
from grade.rewards.head_training import HeadTraining
from grade.rewards.shared import head_lines, head_report
from grade.tasks import load_task


def train_reward(config: Config) -> dict[str, float]:
    """`grade reward`: train the head of a config (or find it trained), print and return its held-out accuracy, or of
    numbers its R²."""

    if config.reward.model is not None:
        raise GradeError("reward.model names a trained classifier: there is no head to train. Set it to null.")
    if config.task.name in JUDGED_BY_PROGRAM:
        raise GradeError(f"task.name={config.task.name} is judged by a program: there is no head to train.")
    if not trains_head(config.task, config.reward):
        raise GradeError("the reward is a function alone: there is no head to train. Set reward.weight for one.")
    tokenizer = load_tokenizer(config.model)
    task = load_task(config.task, config.tokenizer)
    policy = load_policy(config, tokenizer, make_accelerator(config).device)
    judged = judged_length(config.task, config.reward, config.generation)
    training = HeadTraining(config.reward, judged, config.output_dir, policy, task)
    training.head()
    report = head_report(training.folder)
    console = Console()
    console.print(f"Reward head: {training.folder}", soft_wrap=True)
    for line in head_lines(report):
        console.print(f"  {line}", soft_wrap=True)
    return report["accuracy"] if "accuracy" in report else report["r2"]

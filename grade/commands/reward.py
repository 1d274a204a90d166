"""`grade reward`: train the reward head of a config by itself, and look whether GRADE can follow a reward."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console

from grade.config import Config, judged_length, trains_head, trains_proxy, without_gradient
from grade.config.methods import BY_VALUE
from grade.config.tasks import JUDGED_BY_PROGRAM
from grade.errors import GradeError, writing
from grade.files import check_writable, replace_text
from grade.model.loading import load_policy, load_tokenizer
from grade.processes import main_process_first, make_accelerator
from grade.rewards.head_training import HeadTraining
from grade.rewards.loading import proxy_training
from grade.rewards.shared import head_lines, head_report
from grade.tasks import load_task
from grade.training.api import GradeTrainer
from grade.training.gradient_check import GradientCheck
from grade.training.swap_statistics import table


def train_reward(config: Config) -> dict[str, float]:
    """`grade reward`: train the head of a config, or the proxy of its program (or find it trained), print and return
    its held-out accuracy, or of numbers its R²."""

    if config.reward.model is not None:
        raise GradeError("reward.model names a trained classifier: there is no head to train. Set it to null.")
    proxy = trains_proxy(config.task, config.reward)
    if config.task.name in JUDGED_BY_PROGRAM and not proxy:
        raise GradeError(
            f"task.name={config.task.name} is judged by a program: there is no head to train. Set reward.proxy to true "
            "for a proxy of it that has a gradient."
        )
    if not proxy and not trains_head(config.task, config.reward):
        raise GradeError("the reward is a function alone: there is no head to train. Set reward.weight for one.")
    tokenizer = load_tokenizer(config.model)
    task = load_task(config.task, config.tokenizer)
    accelerator = make_accelerator(config)
    policy = load_policy(config, tokenizer, accelerator.device)
    judged = judged_length(config.task, config.reward, config.generation)
    training: HeadTraining
    if proxy:
        training = proxy_training(config.reward, policy, task, judged, config.output_dir, config.generation)
    else:
        training = HeadTraining(config.reward, judged, config.output_dir, policy, task)
    with main_process_first(accelerator):
        training.head()
    report = head_report(training.folder)
    if accelerator.is_main_process:
        console = Console()
        console.print(f"{'Proxy' if proxy else 'Reward head'}: {training.folder}", soft_wrap=True)
        for line in head_lines(report):
            console.print(f"  {line}", soft_wrap=True)
    return report["accuracy"] if "accuracy" in report else report["r2"]


def check_reward_gradient(config: Config) -> GradientCheck:
    """`grade reward --check_gradient`: whether GRADE can follow the reward of a config; a head that is missing is
    trained first. Prints the table and writes it beside the runs.

    Raises:
        GradeError: the reward has no gradient, or the file cannot be written.
    """
    reason = without_gradient(config.task, config.reward)
    if reason is not None:
        raise GradeError(
            f"--check_gradient: {reason}, without a gradient that GRADE could follow. Follow it with a method that "
            f"only needs its value: {', '.join(BY_VALUE)}"
            + ("; or set reward.proxy to true." if config.task.name in JUDGED_BY_PROGRAM else ".")
        )
    path = Path(config.output_dir) / f"gradient-check-{config.name}.json"
    check_writable("output_dir", path.parent)
    trainer = GradeTrainer.from_config(config)
    found = trainer.check_gradient()
    if trainer.accelerator.is_main_process:
        console = Console()
        console.print(table(found.rows).rich(keys=2))
        console.print(found.verdict, soft_wrap=True)
        with writing(path.parent, "output_dir"):
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_text(path, json.dumps(found.as_dict(), indent=2) + "\n")
        console.print(f"Written to {path}", soft_wrap=True)
    return found

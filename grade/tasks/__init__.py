"""Tasks: where prompts come from. They know texts and puzzles, and no model."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from grade.config import TaskConfig, TokenizerConfig
from grade.errors import GradeError
from grade.tasks import countdown, demo, prompts, sentiment
from grade.tasks.base import Task
from grade.tasks.texts import TextTask


class Kind(NamedTuple):
    """The tasks of a name.

    Attributes:
        task: their class.
        load: makes one from the settings, section `tokenizer`, and whether texts need labels.
    """

    task: type[Task]
    load: Callable[[TaskConfig, TokenizerConfig | None, bool], Task]


TASKS = {
    "sentiment": Kind(TextTask, lambda settings, chat, labels: sentiment.load(settings, labels=labels)),
    "demo": Kind(TextTask, lambda settings, chat, labels: demo.load(settings)),
    "countdown": Kind(countdown.CountdownTask, lambda settings, chat, labels: countdown.load(settings, chat)),
    "prompts": Kind(prompts.PromptTask, lambda settings, chat, labels: prompts.load(settings, chat)),
}
"""By task.name, as `TaskConfig` has it."""


def task_of(name: str) -> Kind:
    """What task.name=`name` is.

    Raises:
        GradeError: there is no such task.
    """
    if name not in TASKS:
        raise GradeError(f"task.name is {name!r}: it must be one of {', '.join(TASKS)}.")
    return TASKS[name]


def load_task(settings: TaskConfig, chat: TokenizerConfig | None = None, *, labels: bool = True) -> Task:
    """The task that `settings.name` names.

    Args:
        chat: section `tokenizer`, for prompts that are conversations.
        labels: a reward head is trained on labelled texts; false: texts need not have labels.

    Raises:
        GradeError: the data cannot be found, read or split as the settings ask; it says what to change.
    """
    return task_of(settings.name).load(settings, chat, labels)

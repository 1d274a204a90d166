"""Tasks: where prompts come from. They know texts and puzzles, and no model."""

from __future__ import annotations

from grade.config import TaskConfig, TokenizerConfig
from grade.errors import GradeError
from grade.tasks import countdown, demo, prompts, sentiment
from grade.tasks.base import Task

NAMES = ("sentiment", "demo", "countdown", "prompts")


def load_task(settings: TaskConfig, chat: TokenizerConfig | None = None, *, labels: bool = True) -> Task:
    """The task that `settings.name` names.

    Args:
        chat: section `tokenizer`, for prompts that are conversations.
        labels: a reward head is trained on labelled texts; false: texts need not have labels.

    Raises:
        GradeError: the data cannot be found, read or split as the settings ask; it says what to change.
    """
    if settings.name == "sentiment":
        return sentiment.load(settings, labels=labels)
    if settings.name == "demo":
        return demo.load(settings)
    if settings.name == "countdown":
        return countdown.load(settings, chat)
    if settings.name == "prompts":
        return prompts.load(settings, chat)
    raise GradeError(f"task.name is {settings.name!r}: it must be one of {', '.join(NAMES)}.")

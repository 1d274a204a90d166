"""Tasks: where prompts come from. They know texts and puzzles, and no model."""

from __future__ import annotations

from collections.abc import Callable

from grade.config import TaskConfig
from grade.errors import GradeError
from grade.tasks import countdown, demo, sentiment
from grade.tasks.base import Task

LOADERS: dict[str, Callable[[TaskConfig], Task]] = {
    "sentiment": sentiment.load, "demo": demo.load, "countdown": countdown.load,
}
"""By task.name."""


def load_task(settings: TaskConfig) -> Task:
    """The task that `settings.name` names.

    Raises:
        GradeError: the data cannot be found, read or split as the settings ask; it says what to change.
    """
    if settings.name not in LOADERS:
        raise GradeError(f"task.name is {settings.name!r}: it must be one of {', '.join(LOADERS)}.")
    return LOADERS[settings.name](settings)

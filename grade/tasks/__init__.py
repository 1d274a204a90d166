"""Tasks: where prompts come from. They know texts and puzzles, and no model."""

from __future__ import annotations

from grade.config import Config
from grade.errors import GradeError
from grade.tasks import countdown, demo, sentiment

_TASKS = {"sentiment": sentiment, "demo": demo, "countdown": countdown}


def load_task(config: Config):
    """The task that `config.task.name` names.

    Raises:
        GradeError: the data cannot be found, read or split as the settings ask; it says what to change.
    """
    name = config.task.name
    if name not in _TASKS:
        raise GradeError(f"task.name is {name!r}: it must be one of {', '.join(_TASKS)}.")
    return _TASKS[name].load(config.task)

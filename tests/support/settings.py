"""Settings by their dotted names."""

from __future__ import annotations

from grade.config import Config, get_setting


def set_setting(config: Config, dotted: str, value) -> None:
    *sections, last = dotted.split(".")
    setattr(get_setting(config, ".".join(sections)) if sections else config, last, value)

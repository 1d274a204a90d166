"""Names of models and data sets: a folder here, or something on the hub. What means a path is never looked up there."""

from __future__ import annotations

from pathlib import Path

GIVEN = "given:"
"""Before the names of what a program has given as an object, which no setting can name: no folder and no repository of
the hub is called so."""


def looks_local(name: str) -> bool:
    """Whether a name means a path: it starts as one, has more parts than a hub name, or exists here."""
    try:
        here = Path(name).exists()
    except (OSError, ValueError):  # too long for a path, or with a character that none may have
        here = False
    return here or name.startswith((".", "/", "~")) or "\\" in name or name.count("/") > 1


def name_anywhere(name: str) -> str:
    """A model's name that means the same from every directory: a folder's absolute path, or a hub name as it is."""
    folder = Path(name).expanduser()
    return str(folder.absolute()) if folder.is_dir() else name

"""A run's config.yaml, whose last line tells whether the file still holds what was written."""

from __future__ import annotations

import hashlib
from pathlib import Path

from grade.config import Config
from grade.config.reading import config_from_yaml, config_to_yaml
from grade.errors import GradeError, failure_of

_SEAL = "# SHA-256 of the lines above: "


def sealed_yaml(config: Config) -> str:
    """`config_to_yaml` with a last line that tells whether a file still holds it: half of one would be a config too."""
    text = config_to_yaml(config)
    return f"{text}{_SEAL}{hashlib.sha256(text.encode()).hexdigest()}\n"


def check_sealed(path: Path) -> None:
    """Refuse a run's config.yaml that is not what was written.

    Raises:
        GradeError: it is missing, damaged or edited.
    """
    try:
        text, seal, claimed = path.read_text(encoding="utf-8").rpartition(_SEAL)
    except (OSError, UnicodeDecodeError) as error:
        reason = failure_of(error)
        raise GradeError(f"{path} cannot be read ({reason}). Name the folder of a run.") from error
    if not seal or hashlib.sha256(text.encode()).hexdigest() != claimed.strip():
        raise GradeError(
            f"{path} is damaged, or was changed by hand (its last line tells). Put it back; other settings are given "
            "as options."
        )


def config_from_sealed(path: Path) -> Config:
    """The settings that a run was made with.

    Raises:
        GradeError: as `check_sealed`.
    """
    check_sealed(path)
    return config_from_yaml(path)

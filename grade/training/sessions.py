"""Who made a run, when and with what: a session for its start and one for every time that it went on, in run.json.

    command       the command line, without the interpreter's and the program's folders
    started, ended    UTC; `ended` is null while a session runs, and stays so where it was killed
    after_step    optimizer steps that the policy had had
    processes     that shared the work
    deterministic    whether it took only operations that give the same bits each time
    versions      of Python, of this program and of the libraries that compute
    machine       processor and accelerator
    git_commit    of the code, with `-dirty` where files were changed since; null where it is not in a repository

Nothing of it enters a fingerprint: a run may go on elsewhere, and two equal runs differ in nothing but their sessions.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from grade import __version__
from grade.machine import machine

SESSIONS = "sessions"
"""The key of run.json that holds the list."""
_LIBRARIES = ("torch", "transformers", "peft", "accelerate", "datasets", "tokenizers", "safetensors", "triton")
_PATIENCE = 10.0  # seconds for an answer of git


def begun(step: int, processes: int, deterministic: bool) -> dict[str, Any]:
    """The entry of a session that starts now."""
    here = machine()
    return {
        "command": command_line(),
        "started": utc_now(),
        "ended": None,
        "after_step": step,
        "processes": processes,
        "deterministic": deterministic,
        "versions": {"grade": __version__, "python": here["python"], **_versions()},
        "machine": {name: here[name] for name in ("cpu", "device")},
        "git_commit": git_commit(Path(__file__).parent),
    }


def earlier(record: Path) -> list[dict[str, Any]]:
    """The sessions in a run's record so far. A record that cannot be read has none: it is about to be written anew."""
    try:
        found = json.loads(record.read_text(encoding="utf-8"))[SESSIONS]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []
    return [session for session in found if isinstance(session, dict)] if isinstance(found, list) else []


def utc_now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def command_line() -> str:
    """This process's command as a shell takes it."""
    program, *arguments = sys.argv or [""]
    path = Path(program)
    ours = path.name == "grade" or path.parts[-2:] == ("grade", "__main__.py")
    return shlex.join([*(["grade"] if ours else ["python", path.name]), *arguments])


def git_commit(folder: Path) -> str | None:
    """The commit that the code in a folder is of; None where git does not track that code: an installed package may lie
    in the repository of somebody else's project."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "--no-optional-locks", "-C", str(folder), *arguments],
                capture_output=True,
                text=True,
                timeout=_PATIENCE,
                stdin=subprocess.DEVNULL,
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if not git("ls-files", "--", "*.py"):
        return None
    return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def _versions() -> dict[str, str]:
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found

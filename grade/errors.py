"""The error that a user can mend, and how other libraries' errors are quoted in it."""

from __future__ import annotations


class GradeError(Exception):
    """The user can mend it: its text names the setting, the reason and the fix; the CLI exits with 2."""


def first_line(error: Exception) -> str:
    """What another library's error says, in one line: some of their messages list every choice there is."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]

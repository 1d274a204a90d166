"""The command line: `grade {demo,reward,train,plan,evaluate,generate,export,push,compare,variance,report,doctor}`.

    grade train imdb_small                          a config that ships with the package
    grade train my.yaml --train.steps 10            a file, with an override
    grade train imdb_small --print_config > my.yaml

Relative paths in settings are relative to the current directory. Torch and everything that needs it is
imported after the settings have been checked: help is quick, and mistakes show before anything is loaded.
Exit codes: 0; 1 when `compare` lacks the results of a run that failed (its tables are printed, what failed is named
last); 2 for a mistake the user can mend (one message, no traceback); 3 when an alarm of `guard` has ended a run, which
is saved; 130 when interrupted.
"""

from __future__ import annotations

import difflib
import os
import shlex
import sys
import time

from grade import __version__
from grade.commands import verbs as commands
from grade.commands.arguments import HELP, emit
from grade.commands.verbs import COMMANDS
from grade.config.reading import shipped_configs
from grade.errors import Collapsed, GradeError
from grade.terminal import silence_libraries

_PATIENCE = 10.0
"""Seconds that a process other than the first waits before it says what went wrong: where the first says it, the
launcher has ended this one by then."""

USAGE = f"""usage: grade COMMAND ...

Align language models by backpropagating a reward through generated tokens. Version {__version__}.

commands:
{chr(10).join(f"  {name:<10} {text}" for name, text in COMMANDS.items())}

`grade COMMAND --help` documents every option. Shipped configs: {{configs}}.
"""


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code. `argv` defaults to the process's arguments."""
    if argv is None:
        silence_libraries()
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        return run(argv)
    except GradeError as error:
        if int(os.environ.get("RANK", "0")):  # one of several processes, which will mostly have the same to say
            time.sleep(_PATIENCE)
        print(f"grade: error: {error}", file=sys.stderr)
        return 3 if isinstance(error, Collapsed) else 2
    except KeyboardInterrupt:
        print("grade: interrupted.", file=sys.stderr)
        if argv[:1] in (["compare"], ["variance"]):
            print("What is done is kept: the same command goes on.", file=sys.stderr)
        if argv[:1] == ["train"]:
            resume = shlex.join([*_without_resume(argv), "--train.resume", "auto"])
            print(f"Go on with: grade {resume}", file=sys.stderr)
        return 130


def run(argv: list[str]) -> int:
    """Choose the command."""
    if not argv or argv[0] in (*HELP, "help"):
        emit(USAGE.format(configs=", ".join(shipped_configs())))
        return 0 if argv else 2
    if argv[0] == "--version":
        emit(f"grade {__version__}\n")
        return 0
    command, rest = argv[0], argv[1:]
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, list(COMMANDS), 1)
        hint = f"; did you mean {near[0]}?" if near else f". Commands: {', '.join(COMMANDS)}."
        raise GradeError(f"unknown command {command!r}{hint}")
    return getattr(commands, command)(rest)


def _without_resume(argv: list[str]) -> list[str]:
    """`argv` without the options that would contradict `--train.resume auto`."""
    kept, waiting = [], list(argv)
    while waiting:
        argument = waiting.pop(0)
        if argument.partition("=")[0] in ("--train.resume", "--train.overwrite"):
            if "=" not in argument and waiting:
                waiting.pop(0)
            continue
        kept.append(argument)
    return kept


if __name__ == "__main__":
    sys.exit(main())

"""What a command line says: the settings of a config or a run, and the options that a command has beside them."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin

from grade.config import Config
from grade.config.bounds import check_text, shown
from grade.config.names import setting_types
from grade.config.options import add_settings, build_config, new_parser, parse_settings, split_arguments
from grade.config.reading import config_to_yaml, find_config, shipped_configs
from grade.config.sealed import check_sealed
from grade.errors import GradeError, printing
from grade.terminal import LEVELS, Level, set_level

HELP = ("-h", "--help")
_FLAGS = ["help", "h", "print_config"]


class Own(NamedTuple):
    """An option that is no setting."""

    kind: Any
    """Its type; None for a switch, which has no value."""
    default: Any
    metavar: str
    help: str


_TERMINAL = {
    "quiet": Own(None, False, "", "Say nothing but results and what is wrong: --log_level warning."),
    "log_level": Own(
        Level,
        "info",
        "|".join(LEVELS),
        "What is said on standard error: what is wrong; progress too; also what other libraries warn of.",
    ),
}
"""Of every command that has settings."""


class Resolved(NamedTuple):
    """What a command line says."""

    config: Config
    """The validated settings."""
    options: Any
    """Namespace with the command's own options."""
    positional: str
    """CONFIG or RUN_DIR; `demo` for a command without."""
    more: list[str]
    """What was named after it."""
    switches: set[str]
    """The switches that were given."""


def _config_of_run(run_dir: str) -> Path:
    check_text("RUN_DIR", run_dir, "path")
    path = Path(run_dir) / "config.yaml"
    if not path.is_file():
        raise GradeError(f"{run_dir} is not a run directory: it has no config.yaml.")
    check_sealed(path)
    return path


def path_of(resolved: Resolved, name: str) -> Path | None:
    """An option's path; None where it is not set."""
    text = getattr(resolved.options, name)
    if text is not None:
        check_text(f"--{name}", text, "path")
    return Path(text) if text else None


def resolve(
    command: str,
    argv: list[str],
    description: str,
    own: Mapping[str, Own] | None = None,
    *,
    positional: Literal["CONFIG", "RUN_DIR"] | None = "CONFIG",
    more: str = "",
    most: int | None = 1,
) -> Resolved | None:
    """What a command line says; None when it asked for help or for the settings, which are then printed.

    Args:
        own: the command's own options by name, beside the settings.
        positional: what it is called with; None: nothing, and the config `demo` gives the settings.
        more: what may come after it, for the help.
        most: how many words there may be, `positional` included; None: any number.
    """
    own, configs = {**(own or {}), **_TERMINAL}, ", ".join(shipped_configs())
    called = " ".join(
        [
            f"grade {command}",
            *filter(None, (positional, more)),
            *(
                f"[--{name} {option.metavar}]".replace(" ]", "]")
                for name, option in own.items()
                if name not in _TERMINAL
            ),
            "[--section.field VALUE ...]",
        ]
    )
    if positional == "CONFIG":
        description += (
            f" CONFIG: a YAML file or a shipped config ({configs}); named beside --help, its values are shown as "
            "defaults. Relative paths are relative to the current directory."
        )
    parser = new_parser(prog=f"grade {command}", usage=called, description=description)
    group = parser.add_argument_group("the command's own")
    switches = [name for name, option in own.items() if option.kind is None]
    kinds = {name: option.kind for name, option in own.items() if option.kind is not None}
    for name, option in own.items():
        if option.kind is None:
            group.add_argument(f"--{name}", action="store_true", help=option.help)
            continue
        group.add_argument(
            f"--{name}", type=option.kind, default=option.default, metavar=option.metavar, help=option.help
        )
    parser.add_argument("--print_config", action="store_true", help="Print the settings as YAML and exit.")
    add_settings(parser)
    positionals, options = split_arguments(argv, [*setting_types(), *kinds], [*_FLAGS, *switches], parser.prog)
    if most is not None and len(positionals) > most * (positional is not None):
        raise GradeError(
            f"unexpected argument {positionals[-1]!r}: settings are written --section.field VALUE "
            f"(`{parser.prog} --help`)."
        )
    wants_help = any(option in HELP for option in options)
    wants_config = "--print_config" in options
    # Help and printing come after everything else was checked, so the parser must not act on them.
    set_here = {name for name in switches if f"--{name}" in options}
    apart = (*HELP, "--print_config", *(f"--{name}" for name in switches))
    options = [option for option in options if option not in apart]
    if positional is not None and not positionals:
        if wants_help:
            emit(parser.format_help())
            return None
        hint = f" Shipped configs: {configs}." if positional == "CONFIG" else ""
        raise GradeError(f"{positional} is missing: {called}.{hint}")
    given = positionals[0] if positionals else "demo"
    path = _config_of_run(given) if positional == "RUN_DIR" else find_config(given)
    _check_choices(own, options)
    namespace = parse_settings(parser, path, options, kinds)
    if wants_help:
        emit(parser.format_help())
        return None
    config = build_config(namespace)
    if wants_config:
        emit(config_to_yaml(config))
        return None
    if "quiet" in set_here and "--log_level" in (option.partition("=")[0] for option in options):
        raise GradeError("--quiet is --log_level warning: leave one of the two out.")
    set_level("warning" if "quiet" in set_here else namespace.log_level)
    return Resolved(config, namespace, given, positionals[1:], set_here)


def _check_choices(own: Mapping[str, Own], options: list[str]) -> None:
    """Refuse what is none of an option's choices; the settings' parser would name its types.

    Raises:
        GradeError: naming the option and its choices.
    """
    for i, option in enumerate(options):
        name, equals, value = option.removeprefix("--").partition("=")
        choices = get_args(own[name].kind) if name in own and get_origin(own[name].kind) is Literal else ()
        value = value if equals or i + 1 == len(options) else options[i + 1]
        if choices and value not in choices:
            raise GradeError(f"--{name} is {shown(repr(value))}: it must be one of {', '.join(choices)}.")


def emit(text: str) -> None:
    """Print to standard output, quietly when its reader has gone (`grade train --help | head`)."""
    with printing():
        sys.stdout.write(text)

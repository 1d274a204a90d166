"""The settings as command-line options, made of their dataclasses by jsonargparse.

Names are checked here first, so that an unknown one is refused with the name that was meant.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

from grade.config import Config, get_setting, validate
from grade.config.bounds import is_section, shown
from grade.config.names import did_you_mean, setting_types
from grade.config.number_texts import check_options, describe_type, entry_section
from grade.config.yaml_files import one_line, read_yaml
from grade.errors import GradeError

# A field's help is the string under it. A setting of the whole process, made before the first parser.
set_parsing_settings(docstring_parse_attribute_docstrings=True)


def new_parser(**kwargs: Any) -> ArgumentParser:
    """A parser without options that raises its errors; `kwargs` as for `ArgumentParser`."""
    return ArgumentParser(exit_on_error=False, allow_abbrev=False, **kwargs)


def add_settings(parser: ArgumentParser) -> None:
    """Give `parser` an option for every setting, grouped by section."""
    _add_section(parser, Config, "")


def _add_section(parser: ArgumentParser, section: type, prefix: str) -> None:
    """Options for one dataclass, then for those inside it.

    Section by section, in groups of our own: a nested dataclass added as a whole would also get an option
    `--section FILE`, a second way to read files that skips the checks of `read_yaml`.
    """
    nested = {name: kind for name, kind in get_type_hints(section).items() if is_section(kind)}
    text = " ".join((section.__doc__ or section.__name__).split())
    group = parser.add_argument_group(prefix.rstrip(".") or "everything", text)
    key = prefix.rstrip(".") or None
    group.add_class_arguments(section, key, as_group=False, skip=set(nested), instantiate=False)
    for name, kind in nested.items():
        _add_section(parser, kind, f"{prefix}{name}.")


def split_arguments(
    argv: list[str], known: list[str], flags: list[str], command: str = "grade train"
) -> tuple[list[str], list[str]]:
    """Positional arguments and options of a command line, options checked by name.

    Every option but the flags takes exactly one value, so the two can be told apart without parsing. A lone `-` is no
    option, and after `--` there are none.

    Args:
        argv: what follows the command.
        known: names that take a value, without dashes. Lists also take `--name+ ITEM`.
        flags: names that take none.
        command: whose help an error points to.

    Raises:
        GradeError: an unknown option, with the name that was probably meant; an option without its value; a switch
            with one.
    """
    positionals: list[str] = []
    options: list[str] = []
    waiting = list(argv)
    while waiting:
        argument = waiting.pop(0)
        if argument == "--":
            return positionals + waiting, options
        if not argument.startswith("-") or argument == "-":
            positionals.append(argument)
            continue
        name, equals, _ = argument.lstrip("-").partition("=")
        if name in flags:
            value = argument.partition("=")[2] if equals else next(iter(waiting), "")
            if equals or value.lower() in ("true", "false"):
                raise GradeError(
                    f"{argument.partition('=')[0]} is a switch and takes no value: leave {value!r} out. An argument "
                    "that reads so comes before the switch, or after --."
                )
            options.append(argument)
            continue
        if not argument.startswith("--") or name.removesuffix("+") not in known:
            if any(key.startswith(f"{name}.") for key in known):
                raise GradeError(f"--{name} is a section: set one of its fields, --{name}.FIELD VALUE.")
            shown = argument.partition("=")[0]
            raise GradeError(f"unknown option {shown}{did_you_mean(name, known + flags, '--', command)}")
        options.append(argument)
        if not equals:
            if not waiting or waiting[0].startswith("--"):
                kind = setting_types().get(name.removesuffix("+"))
                raise GradeError(f"--{name} needs a value{f': {describe_type(kind)}' if kind else ''}.")
            options.append(waiting.pop(0))
    return positionals, options


def parse_settings(parser: ArgumentParser, path: Path, options: list[str], own: Mapping[str, Any] | None = None) -> Any:
    """Namespace of `parser`'s values: defaults, then the file at `path`, then `options`.

    The file's values become the parser's defaults, so that its help shows them.

    Args:
        own: types of the options that are no settings, by name.
    """
    values, checked = _of_file(parser, path)
    parser.set_defaults({name: get_setting(checked, name) for name in values})
    check_options(options, {**setting_types(), **(own or {})})
    try:
        return parser.parse_args(options)
    except ArgumentError as error:
        raise GradeError(explain(error, own)) from None


def read_settings(path: Path) -> Config:
    """Defaults, then the file at `path`, validated."""
    return build_config(_of_file(_settings_parser(), path)[1])


@cache
def _settings_parser() -> ArgumentParser:
    """Of the settings alone. Making one takes longer than reading a file with it, which leaves its defaults alone."""
    parser = new_parser()
    add_settings(parser)
    return parser


def _of_file(parser: ArgumentParser, path: Path) -> tuple[dict[str, Any], Any]:
    """What a file sets, by name; and the namespace of that over the parser's defaults."""
    values = read_yaml(path)
    try:
        return values, parser.parse_object(_nest(values))
    except ArgumentError as error:
        raise GradeError(f"{path}: {explain(error)}") from None


def build_config(namespace: Any) -> Config:
    """The dataclasses, filled from a parser's namespace and validated."""

    def build(section: type, values: Any) -> Any:
        filled = {}
        for name, kind in get_type_hints(section).items():
            value = getattr(values, name)
            if is_section(kind):
                filled[name] = build(kind, value)
            elif (entry := entry_section(kind)) is not None:
                filled[name] = [one if isinstance(one, entry) else entry(**vars(one)) for one in value]
            else:
                # A copy, so that no two configs share one of the parser's default lists.
                filled[name] = copy.deepcopy(value) if isinstance(value, (list, dict)) else value
        return section(**filled)

    config = build(Config, namespace)
    validate(config)
    return config


def explain(error: ArgumentError, own: Mapping[str, Any] | None = None) -> str:
    """jsonargparse's message in one line: the setting, its value and what it must be.

    Args:
        own: types of the options that are no settings, by name.
    """
    text = str(error)
    key = re.search(r'[Kk]ey "([\w.]+)"', text)
    value = re.search(r"(?:Got|Given) value: (.*)", text)
    kind = {**setting_types(), **(own or {})}.get(key.group(1)) if key else None
    if not key or not value or kind is None:
        return one_line(error)
    found = "null" if value.group(1) == "None" else shown(value.group(1))
    message = f"{key.group(1)} is {found}: it must be {describe_type(kind)}."
    return message + (" In YAML, put it in quotes." if kind in (str, str | None) else "")


def _nest(values: dict[str, Any]) -> dict[str, Any]:
    """{"a.b": 1} as {"a": {"b": 1}}."""
    nested: dict[str, Any] = {}
    for name, value in values.items():
        *sections, last = name.split(".")
        inner = nested
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[last] = value
    return nested

"""How settings are written: their types in words, and numbers in decimal digits, on the command line and in YAML.

Numbers are read by YAML 1.1 and by Python, which take more for a number than a person does: 0x10 and 010 (8 in a file,
10 on the command line), 1_000, 1:30 (a minute and a half), digits of any script. A setting that is silently another
number is worse than one that is refused.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from grade.config.bounds import numeric, shown
from grade.errors import GradeError

_WHOLE = re.compile(r"[-+]?(0|[1-9][0-9]{0,99})")
_DECIMAL = re.compile(
    r"[-+]?([0-9]{1,100}\.?[0-9]{0,100}|\.[0-9]{1,100})([eE][-+]?[0-9]{1,10})?|[-+]?\.?(inf|nan)", re.IGNORECASE
)
_NULL = ("", "~", "null", "Null", "NULL")
_MISTAKABLE = re.compile(r"[-+]?\d[\d_:.]*|[-+]?0[xXbBoO][\da-fA-F_]+")
"""What Python or YAML takes for a number."""


def describe_type(kind: Any) -> str:
    """A setting's type in words."""
    if get_origin(kind) is Literal:
        return ("one of " if len(get_args(kind)) > 1 else "") + ", ".join(map(str, get_args(kind)))
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(describe_type(part) for part in get_args(kind))
    if get_origin(kind) is list:
        kind = get_args(kind)[0]
        if dataclasses.is_dataclass(kind):
            names = [field.name for field in dataclasses.fields(kind)]
            return f"a list of entries with {', '.join(names)}, written [{{{names[0]}: ...}}]"
        choices = get_args(kind)  # of a Literal
        words = {int: "whole numbers", float: "numbers"}.get(kind, " or ".join(choices) or "texts")
        return f"a list of {words}, written [{'1, 2' if kind in (int, float) else 'a, b'}]"
    if get_origin(kind) is dict:
        return "names with values, written {a: 1, b: true}"
    simple = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    return simple[kind]


def check_options(options: list[str], kinds: Mapping[str, Any]) -> None:
    """Refuse numbers of a command line that are not written in decimal digits.

    Args:
        options: `--name VALUE` or `--name=VALUE`; a list also takes `--name+ ENTRY`.
        kinds: the settings' types by dotted name; others are not looked at.

    Raises:
        GradeError: naming the setting.
    """
    waiting = list(options)
    while waiting:
        name, equals, text = waiting.pop(0).lstrip("-").partition("=")
        if not equals and waiting and not waiting[0].startswith("--"):
            text = waiting.pop(0)
        kind = kinds.get(name.removesuffix("+"))
        node: yaml.Node | None = yaml.ScalarNode("", text)
        if entry_section(kind) is not None or (
            not name.endswith("+") and list in (get_origin(kind), *map(get_origin, get_args(kind)))
        ):
            try:
                node = yaml.compose(text, Loader=yaml.SafeLoader)
            except (yaml.YAMLError, RecursionError):
                continue  # what is wrong is told where it is parsed
        if name.endswith("+") and entry_section(kind) is not None:
            node = yaml.SequenceNode("", [node])
        check_node(name.removesuffix("+"), node, kind)


def entry_section(kind: Any) -> type | None:
    """The dataclass that a setting is a list of; None where it is none."""
    entry = get_args(kind)[0] if get_origin(kind) is list else None
    return entry if dataclasses.is_dataclass(entry) and isinstance(entry, type) else None


def _check_entries(name: str, node: yaml.Node | None, section: type) -> None:
    """Refuse what is no list of such entries: no path, no code, no unknown field.

    Raises:
        GradeError: naming the setting, the entry and its field.
    """
    kinds, defaults = get_type_hints(section), {f.name: f.default for f in dataclasses.fields(section)}
    if not isinstance(node, yaml.SequenceNode):
        raise GradeError(f"{name}: it must be {describe_type(list[section])}.")  # type: ignore[valid-type]
    for place, entry in enumerate(node.value):
        here = f"{name}[{place}]"
        if not isinstance(entry, yaml.MappingNode):
            raise GradeError(f"{here}: {name} must be {describe_type(list[section])}.")  # type: ignore[valid-type]
        given = {key.value: value for key, value in entry.value}
        unknown = [key for key in given if key not in kinds]
        if unknown:
            raise GradeError(f"unknown setting {here}.{shown(unknown[0])}: an entry has {', '.join(kinds)}.")
        missing = [key for key in kinds if key not in given and defaults[key] is dataclasses.MISSING]
        if missing:
            raise GradeError(f"{here} has no {missing[0]}: it must be given.")
        for key, value in given.items():
            kind = kinds[key]
            check_node(f"{here}.{key}", value, kind)
            allowed = tuple(get_args(kind)) or (kind,)
            if numeric(kind) and isinstance(value, yaml.ScalarNode) and value.value not in _NULL:
                continue  # checked above
            if not isinstance(yaml.safe_load(yaml.serialize(value)), allowed):
                raise GradeError(f"{here}.{key} is {shown(value.value)}: it must be {describe_type(kind)}.")


def check_node(name: str, node: yaml.Node | None, kind: Any) -> None:
    """The same of a node of YAML; what is neither a scalar nor a list of scalars is left to the parser.

    Args:
        kind: the setting's type; anything but numbers passes.
    """
    section = entry_section(kind)
    if section is not None:
        return _check_entries(name, node, section)
    numbers = numeric(kind)
    entries = node.value if isinstance(node, yaml.SequenceNode) else [node]
    for entry in entries if numbers else []:
        if not isinstance(entry, yaml.ScalarNode) or entry.value in _NULL:
            continue
        if entry.tag and entry.tag not in yaml.SafeLoader.yaml_constructors:
            continue  # a tag that is refused when its value is made
        text = entry.value.strip()
        if not (_DECIMAL if float in numbers else _WHOLE).fullmatch(text):
            odd = _MISTAKABLE.fullmatch(text) and not _DECIMAL.fullmatch(text) or re.fullmatch(r"[-+]?0\d+", text)
            plain = " Write numbers in plain digits, such as 1000." if odd else ""
            raise GradeError(f"{name} is {shown(text)}: it must be {describe_type(kind)}.{plain}")

"""Whether settings that were made in Python have the types that they are declared with, as those of a file have."""

from __future__ import annotations

import dataclasses
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from grade.config.bounds import is_section, shown
from grade.config.number_texts import describe_type
from grade.errors import GradeError


def check_kinds(section: Any, prefix: str = "") -> None:
    """Refuse a value of another type, and a name that is no setting, in a dataclass and in those inside it.

    Raises:
        GradeError: naming the setting and what it must be.
    """
    hints = get_type_hints(type(section))
    strange = vars(section).keys() - {field.name for field in dataclasses.fields(section)}
    if strange:
        raise GradeError(f"{prefix}{min(strange)} is no setting. Correct the name.")
    for name, kind in hints.items():
        value = getattr(section, name)
        if is_section(kind):
            if not isinstance(value, kind):
                raise GradeError(f"{prefix}{name} is {shown(repr(value))}: it must be a {kind.__name__}.")
            check_kinds(value, f"{prefix}{name}.")
        elif not is_of(value, kind):
            raise GradeError(f"{prefix}{name} is {shown(repr(value))}: it must be {describe_type(kind)}.")


def is_of(value: Any, kind: Any) -> bool:
    """Whether a value is of a setting's type; a whole number is a number too, and true is none."""
    if get_origin(kind) in (Union, UnionType):
        return any(is_of(value, part) for part in get_args(kind))
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) is list:
        return isinstance(value, list) and all(is_of(entry, get_args(kind)[0]) for entry in value)
    if get_origin(kind) is dict:
        return isinstance(value, dict)
    if kind in (int, float):
        return isinstance(value, (int, kind)) and not isinstance(value, bool)
    return isinstance(value, kind)

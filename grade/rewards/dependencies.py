"""What the code of a function reads beside its arguments: defaults, what it has closed over, globals. The same names on
every version of Python, whose compilers make functions of their own of a comprehension or do not."""

from __future__ import annotations

import dis
import inspect
from collections.abc import Iterator, Mapping
from functools import cached_property
from types import CodeType, FunctionType
from typing import Any

_GLOBAL = ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS")
"""Instructions that look a name up in the module; the last two in the body of a class inside a function."""


def read_by(function: FunctionType) -> dict[str, Any]:
    """The values by name, those of functions, lambdas and comprehensions inside it among them. Of one name the default
    counts before what was closed over, and that before the global."""
    code, names = function.__code__, set(_globals_of(function.__code__))
    found = {name: function.__globals__[name] for name in names if name in function.__globals__}
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        try:
            found[name] = cell.cell_contents
        except ValueError:  # nothing is in it yet
            continue
    positional, defaults = code.co_varnames[: code.co_argcount], function.__defaults__ or ()
    found.update(zip(positional[len(positional) - len(defaults) :], defaults, strict=True))
    return {**found, **(function.__kwdefaults__ or {})}


def held_by(value: object) -> dict[str, Any]:
    """An object's own attributes by name, without those that a `functools.cached_property` keeps once it was asked."""
    found: dict[str, Any] = {}
    for kind in reversed(type(value).__mro__):
        slots = vars(kind).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            try:
                found[name] = getattr(value, name)
            except AttributeError:  # not set
                continue
    own: Mapping[str, Any] = getattr(value, "__dict__", {})
    return {
        name: content
        for name, content in {**found, **own}.items()
        if name not in ("__dict__", "__weakref__")
        and not isinstance(inspect.getattr_static(type(value), name, None), cached_property)
    }


def _globals_of(code: CodeType) -> Iterator[str]:
    """The names that a code object and those inside it look up in the module; attributes of the same name are none."""
    for instruction in dis.get_instructions(code):
        if instruction.opname in _GLOBAL:
            yield instruction.argval
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _globals_of(constant)

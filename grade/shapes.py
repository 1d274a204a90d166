"""Whether what was read from a file has the form that this program writes there.

Whole(), NUMBER, str, bool, object    a count from 0 up, a number, a text, a truth value, anything
None                                  nothing
(a, b)                                either of these
[a]                                   a list of them
Fixed(a, b)                           a list of just these
{"name": a, "other?": b, str: c}      an object; what ends in ? may be missing, and `str` is for all other names
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

Shape = Any
DEEPEST = 64
"""Levels of lists and objects in each other that a file of ours never has."""
_LARGEST = 2**53  # every whole number up to this is a float too
_LONGEST = 40  # characters of a value that a message shows


class Whole(NamedTuple):
    """A whole number of at least `least`."""

    least: int = 0


class Fixed(tuple):
    """A list of as many entries, each of its own shape."""

    def __new__(cls, *shapes: Shape) -> Fixed:
        return super().__new__(cls, shapes)


NUMBER = float
"""Whole or not, and NaN or infinite where a run had it; not too large for a float."""
_KINDS = {str: "a text", bool: "true or false", dict: "an object", list: "a list", None: "null"}


def misfit(value: Any, shape: Shape, where: str = "") -> str | None:
    """What is wrong with a value, in words, with its place; None if nothing is.

    Args:
        where: the value's own place, in front of those in it.
    """
    if isinstance(shape, (Whole, Fixed)) or not isinstance(shape, (tuple, list, dict)):
        return _wrong_leaf(value, shape, where)
    if isinstance(shape, tuple):
        wrong = [misfit(value, one, where) for one in shape]
        return None if None in wrong else wrong[0]
    if isinstance(shape, list):
        if not isinstance(value, (list, tuple)):
            return _not(value, list, where)
        return next(_wrong(((f"{where}[{i}]", part, shape[0]) for i, part in enumerate(value))), None)
    if not isinstance(value, dict):
        return _not(value, dict, where)
    named = {str(name).removesuffix("?"): part for name, part in shape.items() if name is not str}
    missing = [name for name in shape if name is not str and not name.endswith("?") and name not in value]
    if missing:
        return f"{where or 'it'} has no entry {missing[0]!r}"
    inside = f"{where}." if where else ""
    rest = shape.get(str, object)
    return next(_wrong((f"{inside}{key}", part, named.get(key, rest)) for key, part in value.items()), None)


def _wrong(parts: Iterator[tuple[str, Any, Shape]]) -> Iterator[str]:
    return (wrong for where, part, shape in parts if (wrong := misfit(part, shape, where)) is not None)


def _wrong_leaf(value: Any, shape: Shape, where: str) -> str | None:
    if shape is object:
        return None
    if isinstance(shape, Fixed):
        if not isinstance(value, (list, tuple)) or len(value) != len(shape):
            return f"{where or 'it'} is {shown(value)}, not a list of {len(shape)}"
        return next(_wrong((f"{where}[{i}]", *pair) for i, pair in enumerate(zip(value, shape, strict=True))), None)
    if isinstance(shape, Whole):
        fits = isinstance(value, int) and not isinstance(value, bool) and shape.least <= value <= _LARGEST
        return None if fits else f"{where or 'it'} is {shown(value)}, not a whole number from {shape.least} up"
    if shape is NUMBER:
        fits = isinstance(value, (int, float)) and not isinstance(value, bool)
        if fits and isinstance(value, int):
            fits = abs(value).bit_length() <= 1023
        return None if fits else f"{where or 'it'} is {shown(value)}, not a number"
    fits = value is None if shape is None else isinstance(value, shape)
    return None if fits else _not(value, shape, where)


def _not(value: Any, kind: Any, where: str) -> str:
    return f"{where or 'it'} is {shown(value)}, not {_KINDS[kind]}"


def shown(value: Any) -> str:
    """A value in a message: its kind, where it holds others, and else itself, as far as it is short."""
    if isinstance(value, (dict, list, tuple)):
        return "an object" if isinstance(value, dict) else "a list"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int) and value.bit_length() > 256:
        return "a number of many digits"
    text = repr(value[:_LONGEST] + ("…" if len(value) > _LONGEST else "")) if isinstance(value, str) else str(value)
    return text if len(text) <= 2 * _LONGEST else text[: 2 * _LONGEST] + "…"


def is_too_deep(value: Any, deepest: int = DEEPEST) -> bool:
    """Whether lists and objects stand in each other to more levels than that: what walks through them, or writes them
    down, would run out of its stack."""
    level = [value]
    for _ in range(deepest + 1):
        inside = {id(part): part for part in level if isinstance(part, (dict, list))}  # each once, wherever it stands
        if not inside:
            return False
        level = [inner for part in inside.values() for inner in (part.values() if isinstance(part, dict) else part)]
    return True

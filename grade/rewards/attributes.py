"""What a reward of one's own depends on beside its code, as texts that a run keeps and compares: thresholds, words,
what a function has closed over.

Told are numbers, texts, bytes, None, regular expressions, paths, members of enumerations, tensors, arrays, and lists,
tuples, dictionaries, sets and dataclasses of these; the texts are the same in every process. Other objects have no text
by which they could be known again, and names that begin with an underscore are for what a reward keeps while it works
(counters, caches): both are left out.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import partial
from pathlib import PurePath
from types import FunctionType, MethodType
from typing import Any

import numpy as np
import torch

from grade.machine import is_out_of_memory
from grade.model.tensors import tensors_digest
from grade.rewards.dependencies import held_by, read_by

_LONGEST = 100  # characters of a text that is kept as it is
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
"""In the text of an object that has none of its own; another one in every process."""


def told(values: Mapping[str, Any]) -> dict[str, str]:
    """The values that can be told, by name; a long text is replaced by its SHA-256."""
    found = {}
    for name, value in values.items():
        if name.startswith("_"):
            continue
        try:
            text = json.dumps(_plain(value), sort_keys=True)
        except Exception as error:  # whatever a strange object raises where it is asked for its content
            if is_out_of_memory(error):  # which says nothing of the value
                raise
            continue
        found[name] = text if len(text) <= _LONGEST else f"SHA-256 {hashlib.sha256(text.encode()).hexdigest()}"
    return found


def of_function(function: Callable[..., Any]) -> dict[str, str]:
    """What a function, a method, a callable object or a `functools.partial` of these depends on: its defaults, what it
    has closed over, the globals that it and the functions inside it read, the arguments that it is given already, and
    as `self.NAME` the attributes of its object."""
    if isinstance(function, partial):
        given = {f"argument {number}": value for number, value in enumerate(function.args)}
        return {**of_function(function.func), **told({**given, **function.keywords})}
    if isinstance(function, MethodType):
        return {**of_function(function.__func__), **_of_owner(function.__self__)}
    wrapped = getattr(function, "__wrapped__", None)  # by a decorator that keeps it
    inside = {} if wrapped is None else of_function(wrapped)
    if isinstance(function, FunctionType):
        return {**inside, **told(read_by(function))}
    if inspect.isroutine(function):  # written in C
        return inside
    return {**inside, **of_function(type(function).__call__), **_of_owner(function)}


def _of_owner(owner: object) -> dict[str, str]:
    held = dict(vars(owner)) if isinstance(owner, type) else held_by(owner)
    return {f"self.{name}": text for name, text in told(held).items()}


def stable_repr(value: Any) -> str:
    """`repr` without what differs between processes: addresses, and the order of sets."""
    if isinstance(value, (set, frozenset)):
        return f"{{{', '.join(sorted(map(stable_repr, value)))}}}"
    if type(value) is dict:
        return f"{{{', '.join(f'{stable_repr(name)}: {stable_repr(each)}' for name, each in value.items())}}}"
    if type(value) is list:
        return f"[{', '.join(map(stable_repr, value))}]"
    if type(value) is tuple:
        return f"({', '.join(map(stable_repr, value))}{',' * (len(value) == 1)})"
    return _ADDRESS.sub("", repr(value))


def _plain(part: Any) -> Any:
    """A value as JSON has it, sets and dictionaries in an order of their own.

    Raises:
        TypeError: it has no content by which it could be known again.
    """
    if isinstance(part, Enum):
        return {type(part).__qualname__: _plain(part.value)}
    if isinstance(part, np.generic):
        value = part.item()
        return str(value) if isinstance(value, np.generic) else _plain(value)  # a number wider than Python's
    if part is None or isinstance(part, (bool, int, float, str)):
        return part
    if isinstance(part, (bytes, bytearray)):
        return {"bytes": bytes(part).hex()}
    if isinstance(part, re.Pattern):
        return {"pattern": _plain(part.pattern), "flags": int(part.flags)}
    if isinstance(part, PurePath):
        return {"path": str(part)}
    if isinstance(part, torch.Tensor):
        return tensors_digest({"": part})
    if isinstance(part, np.ndarray):
        return _plain(part.tolist()) if part.dtype.kind in "OSUMmV" else tensors_digest({"": _tensor(part)})
    if is_dataclass(part) and not isinstance(part, type):
        return {type(part).__qualname__: told({f.name: getattr(part, f.name) for f in fields(part)})}
    if isinstance(part, Mapping):
        if all(type(name) is str for name in part):
            return {name: _plain(value) for name, value in part.items()}
        return {"pairs": _sorted([_plain(name), _plain(value)] for name, value in part.items())}
    if isinstance(part, (list, tuple)):
        return [_plain(each) for each in part]
    if isinstance(part, (set, frozenset)):
        return _sorted(_plain(each) for each in part)
    raise TypeError(type(part).__name__)


def _tensor(array: np.ndarray) -> torch.Tensor:
    """An array's values as torch has them, whatever its byte order."""
    return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("="), order="C"))


def _sorted(parts: Any) -> list:
    return sorted(parts, key=lambda part: json.dumps(part, sort_keys=True))

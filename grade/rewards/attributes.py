"""What a reward of one's own depends on beside its code, as texts that a run keeps and compares: thresholds, words,
what a function has closed over.

Told are numbers, texts, None, tensors, arrays, and lists, dictionaries and sets of these. Other objects have no text by
which they could be known again, and names that begin with an underscore are for what a reward keeps while it works
(counters, caches): both are left out.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch

from grade.model.fingerprint import tensors_digest

_LONGEST = 100  # characters of a text that is kept as it is
_LARGEST = 2**22  # numbers of a tensor; what is larger is a model's, and belongs in `Reward.modules`


def told(values: Mapping[str, Any]) -> dict[str, str]:
    """The values that can be told, by name; a long text is replaced by its SHA-256."""
    found = {}
    for name, value in values.items():
        if name.startswith("_"):
            continue
        try:
            text = json.dumps(value, sort_keys=True, default=_plain)
        except (TypeError, ValueError, RecursionError):
            continue
        found[name] = text if len(text) <= _LONGEST else f"SHA-256 {hashlib.sha256(text.encode()).hexdigest()}"
    return found


def of_function(function: Callable[..., Any]) -> dict[str, str]:
    """What a function, a method, a callable object or a `functools.partial` of these depends on: its defaults, what it
    has closed over, the globals that it names, the attributes of its object, the arguments that it is given already."""
    if isinstance(function, partial):
        given = {f"argument {number}": value for number, value in enumerate(function.args)}
        return {**of_function(function.func), **told({**given, **function.keywords})}
    function = inspect.unwrap(function)
    if not hasattr(function, "__code__"):
        return told(getattr(function, "__dict__", {}))
    owner = told(getattr(getattr(function, "__self__", None), "__dict__", {}))
    try:
        read, parameters = inspect.getclosurevars(function), inspect.signature(function).parameters
    except (TypeError, ValueError):  # compiled by other tools, or with something that it has not got yet
        return owner
    defaults = {name: p.default for name, p in parameters.items() if p.default is not p.empty}
    return {**owner, **told({**read.globals, **read.nonlocals, **defaults})}


def _plain(part: Any) -> Any:
    """A set, an array or a tensor as JSON has it."""
    if isinstance(part, (set, frozenset)):
        return sorted(part)
    if isinstance(part, np.generic):
        return part.item()
    if isinstance(part, np.ndarray):
        part = torch.as_tensor(part)
    if isinstance(part, torch.Tensor) and part.numel() <= _LARGEST:
        return tensors_digest({"": part})
    raise TypeError(type(part).__name__)

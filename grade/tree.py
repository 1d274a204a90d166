"""Nested dictionaries and lists of numbers, texts and tensors in two files that hold no code: JSON and safetensors.

What JSON does not know is written as an object with one key: a tensor as its name in the safetensors file, a tuple,
and a dictionary whose keys are no texts, such as an optimizer's state, as its items.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from grade.errors import GradeError, read_json, reason_of

_TENSOR, _TUPLE, _ITEMS = "__tensor__", "__tuple__", "__items__"


def save(stem: Path, tree: dict) -> None:
    """Write `stem`.json and `stem`.safetensors.

    Raises:
        OSError, SafetensorError: they cannot be written.
        TypeError: something in the tree has no place in either.
    """
    tensors: dict[str, Tensor] = {}
    text = json.dumps(_packed(tree, tensors), indent=2)
    save_file(tensors, stem.with_name(stem.name + ".safetensors"))
    stem.with_name(stem.name + ".json").write_text(text + "\n", encoding="utf-8")


def load(stem: Path) -> dict[str, Any]:
    """The tree, its tensors on the CPU.

    Raises:
        GradeError: a file is missing, damaged, or does not belong to the other.
    """
    path = stem.with_name(stem.name + ".safetensors")
    packed = read_json(stem.with_name(stem.name + ".json"), "")
    try:
        return _unpacked(packed, load_file(path))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise GradeError(f"{path} cannot be read ({reason_of(error)}).") from error


def leaves(tree: Any) -> Iterator[Any]:
    """What a tree holds beside dictionaries, lists and tuples."""
    if isinstance(tree, dict):
        tree = list(tree.values())
    if isinstance(tree, (list, tuple)):
        for part in tree:
            yield from leaves(part)
    else:
        yield tree


def _packed(tree: Any, tensors: dict[str, Tensor]) -> Any:
    """The tree as JSON has it; its tensors are put into `tensors`."""
    if isinstance(tree, Tensor):
        name = str(len(tensors))
        tensors[name] = tree.detach().cpu().contiguous().clone()  # safetensors refuses tensors that share memory
        return {_TENSOR: name}
    if isinstance(tree, tuple):
        return {_TUPLE: [_packed(part, tensors) for part in tree]}
    if isinstance(tree, list):
        return [_packed(part, tensors) for part in tree]
    if not isinstance(tree, dict):
        return tree
    if all(isinstance(key, str) for key in tree):
        return {key: _packed(part, tensors) for key, part in tree.items()}
    return {_ITEMS: [[key, _packed(part, tensors)] for key, part in tree.items()]}


def _unpacked(packed: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(packed, list):
        return [_unpacked(part, tensors) for part in packed]
    if not isinstance(packed, dict):
        return packed
    if set(packed) == {_TENSOR}:
        return tensors[packed[_TENSOR]]
    if set(packed) == {_TUPLE}:
        return tuple(_unpacked(part, tensors) for part in packed[_TUPLE])
    if set(packed) == {_ITEMS}:
        return {key: _unpacked(part, tensors) for key, part in packed[_ITEMS]}
    return {key: _unpacked(part, tensors) for key, part in packed.items()}

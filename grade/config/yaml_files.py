"""A YAML file of settings, checked key by key: a mistyped one deserves its line and the name that was meant."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import yaml

from grade.config.names import did_you_mean, setting_types
from grade.config.number_texts import check_node, describe_type
from grade.errors import GradeError

_NULL = ("null", "Null", "NULL", "~")
"""Written out, unlike the nothing of an empty section."""
_MOST_NODES = 100_000
_UNREADABLE = (
    OSError,
    ValueError,
    ArithmeticError,
    LookupError,
    TypeError,
    AttributeError,
    RecursionError,
    yaml.YAMLError,
)


def read_yaml(path: Path) -> dict[str, Any]:
    """The settings in a file as {dotted name: value}, in its order.

    Raises:
        GradeError: with the line, for malformed YAML, an unknown or a repeated key.
    """
    try:
        loader = yaml.SafeLoader(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise GradeError(f"cannot read {path}: {one_line(error)}") from None
    values: dict[str, Any] = {}
    try:
        root = loader.get_single_node()
        if root is None:
            return values
        _check_size(root)
        if not isinstance(root, yaml.MappingNode):
            raise GradeError(f"{path} is not a settings file: write `section:` and `field: value` lines.")
        for name, line, value in _flatten(root, loader, setting_types()):
            if name in values:
                raise GradeError(f"{path}, line {line}: {name} is set a second time.")
            values[name] = value
    except GradeError as error:
        message = str(error)
        raise GradeError(message if message.startswith(str(path)) else f"{path}, {message}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise GradeError(f"{path}{where}: malformed YAML: {error.problem}.") from None
    except yaml.YAMLError as error:
        raise GradeError(f"{path}: malformed YAML: {one_line(error)}") from None
    except RecursionError:
        raise GradeError(f"{path}: malformed YAML: it is nested too deeply.") from None
    finally:
        loader.dispose()
    return values


def plain_yaml(path: Path) -> Any:
    """What a YAML file holds: objects, lists, texts and numbers, whatever their names; no code of it runs.

    Raises:
        GradeError: it cannot be read, or is malformed.
    """
    try:
        loader = yaml.SafeLoader(path.read_text(encoding="utf-8"))
        try:
            root = loader.get_single_node()
            if root is None:
                return None
            _check_size(root)
            return loader.construct_document(root)
        finally:
            loader.dispose()
    except _UNREADABLE as error:
        raise GradeError(f"cannot read {path}: {one_line(error)}") from None
    except GradeError as error:
        raise GradeError(f"{path}: {error}") from None


def _value(loader: yaml.SafeLoader, node: yaml.Node, line: int) -> Any:
    """What a node stands for.

    Raises:
        GradeError: it is tagged as what it is not, such as `!!bool perhaps`, of which YAML's reader has no words.
    """
    try:
        return loader.construct_object(node, deep=True)
    except (LookupError, ValueError, ArithmeticError, TypeError, AttributeError) as error:
        raise GradeError(f"line {line}: malformed YAML: a value is not what its tag says ({error}).") from None


def _check_size(root: yaml.Node) -> None:
    """Refuse what names parts of itself again and again: written out, a few lines would fill the memory.

    Raises:
        GradeError: it is larger than any settings, or holds itself.
    """
    sizes: dict[int, int] = {}

    def size(node: Any) -> int:
        if isinstance(node, tuple):
            return sum(map(size, node))
        if isinstance(node, yaml.ScalarNode):
            return 1
        if id(node) not in sizes:
            sizes[id(node)] = _MOST_NODES  # of one that holds itself: while it is counted
            sizes[id(node)] = 1 + sum(map(size, node.value))
        return sizes[id(node)]

    if size(root) >= _MOST_NODES:
        raise GradeError("malformed YAML: by its aliases it is larger than any settings, or holds itself.")


def _flatten(
    node: yaml.MappingNode, loader: yaml.SafeLoader, known: dict[str, Any], prefix: str = ""
) -> Iterator[tuple[str, int, Any]]:
    """(dotted name, line, value) of every setting below `node`; a GradeError at the first unknown key."""
    for key_node, value_node in node.value:
        name = f"{prefix}{key_node.value}"
        line = key_node.start_mark.line + 1
        is_section = any(key.startswith(f"{name}.") for key in known)
        if name in known:
            try:
                check_node(name, value_node, known[name])
            except GradeError as error:
                raise GradeError(f"line {line}: {error}") from None
            value = _value(loader, value_node, line)
            # jsonargparse takes null for 'not set', whatever the type.
            if value is None and type(None) not in get_args(known[name]):
                raise GradeError(f"line {line}: {name} is null: it must be {describe_type(known[name])}.")
            yield name, line, value
        elif is_section and isinstance(value_node, yaml.MappingNode):
            yield from _flatten(value_node, loader, known, f"{name}.")
        elif is_section:
            if name == "model.lora" and isinstance(value_node, yaml.ScalarNode) and value_node.value in _NULL:
                yield "model.finetuning", line, "full"
                continue
            # `train:` with every line under it commented out is an empty section.
            if _value(loader, value_node, line) is not None:
                raise GradeError(f"line {line}: {name} is a section: write its settings below it, indented.")
        else:
            # Below a mistyped section, its first setting says best what was meant.
            if isinstance(value_node, yaml.MappingNode) and value_node.value:
                name = f"{name}.{value_node.value[0][0].value}"
            raise GradeError(f"line {line}: unknown setting {name}{did_you_mean(name, list(known))}")


def one_line(error: Exception) -> str:
    """What it says, without line breaks."""
    return " ".join(str(error).split())

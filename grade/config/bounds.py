"""What a setting may be, and whether changing it makes another run: `steps: int = setting(250, ge=1, role="resume")`.

The declaration lies in the dataclass field's metadata, so a setting is one place to read and to change. What depends
on two settings is checked in `grade.config.validate`.
"""

from __future__ import annotations

import dataclasses
import math
import os
import unicodedata
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, TypeGuard, get_type_hints

from grade.errors import GradeError

COUNT = 10**9
"""Most steps, and whatever is counted in steps."""
ROWS = 10**8
"""Most examples of a split and prompts of an evaluation."""
TOKENS = 2**20
"""Most tokens of a text, and most candidates of a token."""
BATCH = 2**16
"""Most responses or texts at a time, and most parts of a step."""
WEIGHT = 1e6
"""Largest weight of a term of the objective, and largest limit of what is clipped."""
RATE = 100.0
"""Largest step size and weight decay: float32 holds every product of them with a parameter."""
SEED = 2**43
"""Largest seed: an epoch's order has seed * 1,000,003 + epoch, which must fit into 63 bits."""

Role = Literal["identity", "resume", "speed", "place"]
"""What changing a setting means. `identity`: it makes another run. The others may change when a run is resumed:
`resume` because what was done so far stays as it is, `speed` because results are the same but for rounding, `place`
because it only says where things are written."""

_TEXT = 4096  # characters of any text
_NAME = 200  # bytes of a name, to which `-seed<seed>`, `compare-` or `.yaml` is added: a file's name has 255
_PART = 240  # bytes of one folder of a path, to which `.yaml` or `.old` is added
_PATH = 3800  # bytes of a path, below which a run has names of its own: 4096 is all that a system takes


class Facts(NamedTuple):
    """What is declared of a setting; of a list, it holds for each entry."""

    ge: float | None = None
    """The least that it may be."""
    gt: float | None = None
    """It is above this."""
    le: float | None = None
    """The most that it may be."""
    lt: float | None = None
    """It is below this."""
    text: Literal["any", "name", "path"] = "any"
    """Of a text: `name` is a part of a file's name, `path` that of something to be written."""
    role: Role | None = None
    """None: that of the section it lies in, and `identity` where that has none."""

    @property
    def numeric(self) -> bool:
        return any(bound is not None for bound in self[:4])

    def __str__(self) -> str:
        """The bounds in words: `at least 1 and at most 100`."""
        words = {"at least": self.ge, "above": self.gt, "at most": self.le, "below": self.lt}
        return " and ".join(f"{word} {_number(bound)}" for word, bound in words.items() if bound is not None)

    def allow(self, number: float) -> bool:
        """Whether a number is finite and within the bounds."""
        return not (
            (isinstance(number, float) and not math.isfinite(number))
            or (self.ge is not None and number < self.ge)
            or (self.gt is not None and number <= self.gt)
            or (self.le is not None and number > self.le)
            or (self.lt is not None and number >= self.lt)
        )


def setting(
    default: Any = dataclasses.MISSING,
    *,
    default_factory: Any = dataclasses.MISSING,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    text: Literal["any", "name", "path"] = "any",
    role: Role | None = None,
) -> Any:
    """A dataclass field with the facts that `Facts` lists in its metadata; None is allowed where the type says so."""
    facts = Facts(ge=ge, gt=gt, le=le, lt=lt, text=text, role=role)
    if default_factory is not dataclasses.MISSING:
        return dataclasses.field(default_factory=default_factory, metadata={"facts": facts})
    return dataclasses.field(default=default, metadata={"facts": facts})


def facts_of(section: type, prefix: str = "", role: Role = "identity") -> Iterator[tuple[str, Any, Facts]]:
    """(dotted name, type, facts) of every setting of a dataclass and of those inside it.

    Args:
        prefix: of the names.
        role: of the settings that declare none.
    """
    kinds = get_type_hints(section)
    for field in dataclasses.fields(section):
        kind, facts = kinds[field.name], field.metadata.get("facts", Facts())
        facts = facts._replace(role=facts.role or role)
        if is_section(kind):
            yield from facts_of(kind, f"{prefix}{field.name}.", facts.role)
        else:
            yield prefix + field.name, kind, facts


def is_section(kind: object) -> TypeGuard[type]:
    """Whether a setting's type is a dataclass of further settings."""
    return dataclasses.is_dataclass(kind)


def check_values(section: Any, prefix: str = "") -> None:
    """Refuse values outside what is declared, in a dataclass and in those inside it.

    Raises:
        GradeError: naming the setting, its value and what it must be.
    """
    for field in dataclasses.fields(section):
        value, name = getattr(section, field.name), prefix + field.name
        if dataclasses.is_dataclass(value):
            check_values(value, f"{name}.")
            continue
        facts = field.metadata.get("facts", Facts())
        for place, entry in enumerate(value if isinstance(value, list) else [value]):
            if dataclasses.is_dataclass(entry):
                check_values(entry, f"{name}[{place}].")
            elif isinstance(entry, str):
                check_text(name, entry, facts.text)
            elif facts.numeric and entry is not None and not facts.allow(entry):
                each = "each must be" if isinstance(value, list) else "it must be"
                raise GradeError(f"{name} is {shown(value)}: {each} {facts}.")


def check_text(name: str, value: str, kind: Literal["any", "name", "path"]) -> None:
    """Refuse a text that no file could hold or, by its kind, that no file could be called.

    Raises:
        GradeError: naming the setting, the reason and what it must be.
    """
    reason = _not_a_text(value)
    if reason is None and kind == "name":
        reason = _not_a_name(value)
    if reason is None and kind == "path":
        reason = _not_a_path(value)
    if reason is not None:
        raise GradeError(f"{name} is {shown(value)}: {reason}.")


def _not_a_text(value: str) -> str | None:
    if len(value) > _TEXT:
        return f"it has {len(value)} characters, and must have at most {_TEXT}"
    if "\0" in value or any("\ud800" <= character <= "\udfff" for character in value):
        return "it holds a character that no text can hold (U+0000, or what is not UTF-8)"
    return None


def _not_a_name(value: str) -> str | None:
    if not value.strip() or "/" in value or "\\" in value or _control(value):
        return "it becomes a part of folder names, so it must not be empty nor hold /, \\ or control characters"
    if len(value.encode()) > _NAME:
        length = len(value.encode())
        return f"it becomes a part of folder names, so it must have at most {_NAME} bytes, and has {length}"
    return None


def _not_a_path(value: str) -> str | None:
    if not value.strip() or _control(value):
        return "it names a file or folder, so it must not be empty nor hold control characters"
    if any(len(part.encode()) > _PART for part in value.split("/")):
        return f"it names a file or folder, so each part of it must have at most {_PART} bytes"
    if len(os.path.abspath(value).encode()) > _PATH:
        return f"it names a file or folder, so it must have at most {_PATH} bytes, with the current directory"
    return None


def _control(value: str) -> bool:
    return any(unicodedata.category(character) == "Cc" for character in value)


def shown(value: Any) -> str:
    """A value in a message: as it would be typed, on one line, and not longer than a line or two."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    try:
        text = ascii(value)[1:-1] if isinstance(value, str) and not value.isprintable() else str(value)
    except ValueError:  # Python does not write out whole numbers of thousands of digits
        text = "a number of thousands of digits"
    return text if len(text) <= 100 else f"{text[:60]}... ({len(text)} characters)"


def _number(bound: int | float) -> str:
    """1000000.0 as it would be typed: 1e6; whole numbers in full."""
    return str(bound) if isinstance(bound, int) else f"{bound:g}".replace("e+0", "e")


def numeric(kind: Any) -> list[type]:
    """The number types in a setting's type: [int] of int | None and of list[int], [] of a text."""
    found: list[type] = [kind] if kind in (int, float) else []
    for part in getattr(kind, "__args__", ()):
        found += numeric(part) if not isinstance(part, (str, bool)) else []
    return found

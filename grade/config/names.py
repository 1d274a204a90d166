"""The names of the settings, and the one that a mistyped name probably meant."""

from __future__ import annotations

import difflib
import functools
from typing import Any

from grade.config import Config
from grade.config.bounds import facts_of


@functools.cache
def setting_types() -> dict[str, Any]:
    """Dotted name of every setting, with its type; sections themselves are not in it. Read only."""
    return {name: kind for name, kind, _ in facts_of(Config)}


def suggest(name: str, known: list[str]) -> list[str]:
    """The names in `known` that a mistyped `name` probably meant; empty when none is near.

    A name without its section (`steps`, `lora.r`) means every setting that ends so, if any does. Otherwise its section
    counts as much as its last part: of the settings there the nearest is meant, or those that go on where it stops
    (`method.tau`). A setting elsewhere is meant only if it alone has just this last part: `method.steps` finds
    `train.steps`, and `train.epochs` finds nothing, though the reward's training and two methods have epochs.
    """
    ends = [key for key in known if key.endswith(f".{name}")]
    if ends:
        return ends
    *parents, last = name.split(".")
    sections = {part for key in known for part in key.split(".")[:-1]}
    section = difflib.get_close_matches(parents[-1], sections, 1) if parents else []
    inside = [key for key in known if not parents or set(section) & set(key.split(".")[:-1])]
    words: dict[str, list[str]] = {}  # a setting's last part, or all after its section (`lora.r`): the settings
    for key in inside:
        for word in {key.split(".")[-1], key.partition(".")[2] or key}:
            words.setdefault(word, []).append(key)

    def nearest(cutoff: float) -> list[str]:
        near = difflib.get_close_matches(last, words, 1, cutoff)
        return [near[0]] if near and near[0] in known else words[near[0]] if near else []

    elsewhere = [key for key in known if key.split(".")[-1] == last]
    alone = [last] if last in known else elsewhere if len(elsewhere) == 1 and elsewhere[0].count(".") == 1 else []
    longer = [key for word, keys in words.items() if word.startswith(f"{last}_") for key in keys]
    return longer or nearest(0.75) or alone or nearest(0.7)


def did_you_mean(name: str, known: list[str], dashes: str = "", command: str = "grade train") -> str:
    """`; did you mean --train.steps?` to end a message with, or where to find all names."""
    near = suggest(name, known)
    if near:
        return f"; did you mean {' or '.join(dashes + key for key in near)}?"
    return f"; `{command} --help` lists them all."

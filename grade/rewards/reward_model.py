"""A reward from one's own data in Python: texts with labels or numbers, or pairs of answers."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from numbers import Real
from typing import Any, TypeVar

from grade.config import RewardConfig, TokenizerConfig
from grade.errors import GradeError
from grade.model.policy import Policy
from grade.rewards.head_fitting import HeadData, fit_head
from grade.rewards.shared import SharedReward
from grade.tasks.base import Example, LabelType, sha256_of
from grade.tasks.conversations import Pair, encode_pairs, read_pair
from grade.tasks.texts import shuffled
from grade.terminal import say

_Row = TypeVar("_Row")
_LABEL_TYPES: dict[str, LabelType] = {"labels": "classes", "targets": "numbers", "pairs": "pairs"}


class RewardModel:
    """Data for a head on the policy's frozen base, which `fit` trains: the reward has a gradient.

    Exactly one of `labels`, `targets` and `pairs` is given.

    Args:
        texts: N texts, as the reward is to read them: prompt and response together, or responses alone.
        labels: N times 1 (to be raised) or 0: the reward is the probability of 1, in (0, 1).
        targets: N numbers: the reward is the head's estimate, unbounded, in their units.
        pairs: N mappings with "chosen" and "rejected", and "prompt" where these do not begin with it; strings or lists
            of messages, as TRL has them. The reward is the sigmoid of the head's logit, in (0, 1).
        held_out: share of the data that is not learnt from but tests the head.
        settings: of the head and its training, and whether it reads prompt and response or the response alone; None:
            the defaults.
        chat: how conversations go through the chat template; None: the defaults.

    Attributes:
        label_type: "classes", "numbers" or "pairs".
        report: errors on the held-out data, as of `fit_head`; empty before `fit`.

    Raises:
        GradeError: the data is incomplete, or has nothing to tell apart.
    """

    def __init__(
        self,
        texts: Sequence[str] | None = None,
        *,
        labels: Sequence[int] | None = None,
        targets: Sequence[float] | None = None,
        pairs: Sequence[Mapping[str, Any]] | None = None,
        held_out: float = 0.1,
        settings: RewardConfig | None = None,
        chat: TokenizerConfig | None = None,
    ):
        given: dict[str, Any] = {"labels": labels, "targets": targets, "pairs": pairs}
        named = [name for name, values in given.items() if values is not None]
        if len(named) != 1:
            raise GradeError(f"RewardModel got {', '.join(named) or 'no labels'}: give one of {', '.join(given)}.")
        if not 0 < held_out < 1:
            raise GradeError(f"RewardModel: held_out is {held_out}, and must be a share between 0 and 1.")
        self.settings, self.chat, self.report = settings or RewardConfig(), chat, dict[str, Any]()
        self.label_type, self.held_out = _LABEL_TYPES[named[0]], held_out
        self.pairs = [] if pairs is None else _pairs(pairs)
        self.examples = [] if pairs is not None else _examples(texts, given[named[0]], named[0])
        usable = len(self.pairs) + len(self.examples)
        if usable < 4:
            count = len(texts or ()) if pairs is None else len(pairs)
            unusable = "texts are empty" if pairs is None else "pairs have equal answers"
            left_out = f" ({count - usable} of {count} {unusable})" if count > usable else ""
            raise GradeError(f"RewardModel has {usable} usable rows{left_out}: at least 4 are needed. Give it more.")
        if len(self.pairs) < len(pairs or ()):
            say(f"RewardModel: {len(pairs or ()) - len(self.pairs)} pairs whose answers are equal are left out")

    def fit(self, policy: Policy, *, judged: int | None = None) -> SharedReward:
        """Train the head on the policy's base.

        Args:
            judged: tokens of the text that it will judge; None: reward.max_tokens.

        Raises:
            GradeError: the training diverged, or the rows that are learnt from have a single label.
        """
        if self.label_type == "pairs":
            data = HeadData("pairs", *(encode_pairs(policy.tokenizer, p, self.chat) for p in self._parts(self.pairs)))
        else:
            learnt, tested = self._parts(self.examples)
            if len({row.label for row in learnt}) < 2:
                raise GradeError("RewardModel: all rows that are learnt from have the same label. Give it both.")
            data = HeadData(self.label_type, learnt, tested)
        head, self.report = fit_head(policy, self.settings, data, judged=judged or self.settings.max_tokens)
        if not math.isfinite(self.report["loss"]):
            raise GradeError(
                f"RewardModel: the head's loss became {self.report['loss']}. Lower settings.learning_rate "
                f"({self.settings.learning_rate})."
            )
        report = {**self.report, "data": {"kind": self.label_type, "sha256": self._data_digest()}}
        return SharedReward(policy, head, self.settings.input, report=report)

    def _data_digest(self) -> str:
        """SHA-256 of the rows, in their order."""
        rows: list[Pair] | list[Example] = self.pairs or self.examples
        return sha256_of(json.dumps(asdict(row), sort_keys=True) for row in rows)

    def _parts(self, rows: list[_Row]) -> tuple[list[_Row], list[_Row]]:
        """Rows to learn from and rows held out, drawn by the seed; at least two and one."""
        rows = shuffled(rows, self.settings.seed)
        count = min(max(1, round(self.held_out * len(rows))), len(rows) - 2)
        return rows[count:], rows[:count]


def _examples(texts: Sequence[str] | None, labels: Sequence[float] | None, name: str) -> list[Example]:
    if texts is None or labels is None or len(texts) != len(labels):
        count = "no" if texts is None else len(texts)
        raise GradeError(f"RewardModel got {count} texts and {len(labels or ())} {name}: give one for each text.")
    for number, (text, label) in enumerate(zip(texts, labels, strict=True)):
        if not isinstance(text, str):
            raise GradeError(f"RewardModel: text {number} is of type {type(text).__name__}: it must be a string.")
        if not isinstance(label, Real) or not math.isfinite(label) or (name == "labels" and label not in (0, 1)):
            raise GradeError(
                f"RewardModel: {name}[{number}] is {label!r}: "
                f"{'labels are 0 or 1; give other numbers as targets' if name == 'labels' else 'it must be finite'}."
            )
    convert = int if name == "labels" else float
    return [
        Example(str(number), text, convert(label))
        for number, (text, label) in enumerate(zip(texts, labels, strict=True))
        if text.strip()
    ]


def _pairs(pairs: Sequence[Mapping[str, Any]]) -> list[Pair]:
    found = []
    for number, row in enumerate(pairs):
        missing = [name for name in ("chosen", "rejected") if name not in row]
        if missing:
            raise GradeError(f"RewardModel: pairs[{number}] has no {missing[0]!r}.")
        pair = read_pair(row.get("prompt"), row["chosen"], row["rejected"], f"RewardModel: pairs[{number}]")
        found += [] if pair is None else [pair]
    return found

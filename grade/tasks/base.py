"""What a task is: prompts by split, and labelled data where it has some. Whoever adds a task subclasses `Task`."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from grade.config import TaskConfig, TokenizerConfig
from grade.tasks.encoding import encode, encode_chats

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


LabelType = Literal["classes", "numbers", "pairs"]
Message = dict[str, Any]
"""Of a conversation: "role" and "content", both strings, and what else a chat template may read."""


@dataclass(frozen=True)
class Example:
    """One text, labelled or not.

    Attributes:
        id: names the row it came from, for example `train/17`.
        text: the cleaned text.
        label: 1 positive, 0 negative; or a number to learn; None: unlabelled.
    """

    id: str
    text: str
    label: float | None


class PairIds(NamedTuple):
    """Two answers to a prompt as token ids, of which the first was preferred."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


@dataclass(frozen=True)
class Labels:
    """What the labels of a data set mean.

    Attributes:
        column: that holds them.
        positive, negative: the two values, as text.
        left_out: how many rows have another value, by value, or, under "", a label and no text; they are in no split.
    """

    column: str
    positive: str
    negative: str | None
    left_out: dict[str, int]

    def __str__(self) -> str:
        others = ", ".join(
            f"{count} with {label!r}" if label else f"{count} without text"
            for label, count in sorted(self.left_out.items())
        )
        return f"{self.positive!r} of column {self.column!r} (negative: {self.negative!r}" + (
            f"; rows left out: {others})" if others else ")"
        )


class Task(ABC):
    """Where prompts come from. The defaults are those of a task that has no labelled texts.

    Attributes:
        labels: what the labels of its texts mean; None where they were not read from data.
        label_type: what a reward head can learn here; None: nothing.
    """

    labels: Labels | None = None
    label_type: LabelType | None = None

    @property
    @abstractmethod
    def name(self) -> str:
        """As task.name has it: rewards are chosen by it, and a run records it."""

    @abstractmethod
    def prompts(self, split: str, tokenizer: PreTrainedTokenizerBase, limit: int | None = None) -> list[list[int]]:
        """Token ids of a split's prompts, in an order that does not change.

        Args:
            split: "policy" (training), "validation" or "test"; of a task that is judged by a program also "reward",
                whose prompts are in none of them and serve a proxy of the program.
            tokenizer: the policy's.
            limit: at most this many prompts (the first ones); None: all.

        Returns:
            Lists of 1 to task.prompt_max_tokens ids, not padded.

        Raises:
            GradeError: no prompts can be made with these settings or this tokenizer.
        """

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What a run records about its data, ready for JSON.

        It holds "task", the name, and "splits", for each split something that changes with its content, such as
        `sha256_of` its texts: by these a run knows its data again.
        """

    @classmethod
    def prompt_of(
        cls, text: str, tokenizer: PreTrainedTokenizerBase, settings: TaskConfig, chat: TokenizerConfig
    ) -> list[int]:
        """Token ids of a prompt that a person writes to a model trained on this task, not cut; no data is read.

        Args:
            chat: section `tokenizer`; with `chat` true the text is a user's message.

        Raises:
            GradeError: it is no prompt of this task, or cannot be encoded.
        """
        if chat.chat:
            return encode_chats(tokenizer, [[{"role": "user", "content": text}]], chat)[0]
        return encode(tokenizer, [text], None)[0]

    def examples(self, split: str) -> Sequence[Example]:
        """Labelled texts: in "reward" to train a reward head on and in "validation" to test it on, in "judge" to train
        the judge of comparisons on and in "test" to test that on."""
        return ()

    def pairs(self, split: str, tokenizer: PreTrainedTokenizerBase) -> Sequence[PairIds]:
        """Answers of which one was preferred: in "reward" to train a reward head on, in "validation" to test it on."""
        return ()

    def columns(self, split: str, index: Sequence[int]) -> dict[str, list[Any]]:
        """The data's other columns, for reward functions: by name, one value for each entry of `index`.

        Args:
            index: positions in the list that `prompts` has last given of this split, in any order, repeated or not.
        """
        return {}

    def conversations(self, split: str, index: Sequence[int]) -> list[list[Message]] | None:
        """The prompts at these positions as lists of messages; None: this task's prompts are texts."""
        return None

    def notes(self) -> list[str]:
        """What a person should know of the data, a line each: what was cut from what, and what was left out."""
        return []


def sha256_of(parts: Iterable[str]) -> str:
    """Hash of a list of strings; a separator that cleaned text cannot hold keeps their borders apart."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode("utf-8", "surrogatepass") + b"\x00")
    return digest.hexdigest()

"""Prompts that a program hands over: texts, token ids, conversations, or the rows of a data set with other columns."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from grade.config import TokenizerConfig
from grade.errors import GradeError
from grade.tasks.base import Task, sha256_of
from grade.tasks.conversations import PromptKind
from grade.tasks.encoding import encode, encode_chats

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROMPT_COLUMNS = ("prompt", "messages")
NAME = "given"
"""What a record calls this task."""
FORMS = (
    "Give strings, lists of token ids, conversations (lists of {'role': ..., 'content': ...}), or a datasets.Dataset "
    "with a column prompt or messages"
)


class Prompts(NamedTuple):
    """The prompts of a split.

    Attributes:
        ids: token ids of each, not padded and not cut.
        conversations: the messages of each; None where prompts are texts or ids.
        columns: the data set's other columns, a value for each prompt.
        kind: what the prompts are; texts that go through the chat template are conversations.
    """

    ids: list[list[int]]
    conversations: list[list[dict[str, str]]] | None
    columns: dict[str, list]
    kind: PromptKind


def read_prompts(
    prompts: Any, tokenizer: PreTrainedTokenizerBase, argument: str = "prompts", chat: TokenizerConfig | None = None
) -> Prompts:
    """Token ids of what a program calls prompts.

    Args:
        prompts: strings, lists of ids, conversations, dictionaries with a key `prompt` or `messages`, or a
            `datasets.Dataset` with such a column.
        argument: what it was given as, for messages.
        chat: how conversations, and with `chat.chat` strings too, go through the chat template; None: the defaults.

    Raises:
        GradeError: it is something else, empty, or of several kinds.
    """
    if isinstance(prompts, (str, bytes, Mapping)) or not hasattr(prompts, "__len__"):
        raise GradeError(f"{argument} is one {type(prompts).__name__}, not a sequence of prompts. {FORMS}.")
    values, columns = _values(prompts, argument)
    if not values:
        raise GradeError(f"{argument} is empty. {FORMS}.")
    kind = _kind(values[0])
    if kind is None or any(_kind(value) != kind for value in values):
        number, wrong = next((n, v) for n, v in enumerate(values) if _kind(v) is None or _kind(v) != kind)
        odd = f"unlike the first ({type(values[0]).__name__})" if _kind(wrong) else "which is no prompt"
        raise GradeError(f"{argument}[{number}] is {_short(wrong)}, {odd}. {FORMS}, all of one kind.")
    conversations = None
    if kind == "texts" and chat is not None and chat.chat:
        values, kind = [[{"role": "user", "content": value}] for value in values], "conversations"
    if kind == "texts":
        ids = encode(tokenizer, values, None)
    elif kind == "token ids":
        ids = [list(map(int, value)) for value in values]
        _check_ids(ids, tokenizer, argument)
    else:
        conversations = [_asked(value) for value in values]
        ids = encode_chats(tokenizer, conversations, chat)
    empty = next((number for number, row in enumerate(ids) if not row), None)
    if empty is not None:
        raise GradeError(f"{argument}[{empty}] has no tokens: there is nothing to continue. Leave it out.")
    return Prompts(ids, conversations, columns, kind)


def _values(prompts: Any, argument: str) -> tuple[list, dict[str, list]]:
    """The prompts themselves, and the other columns of what holds them."""
    if hasattr(prompts, "column_names"):  # a datasets.Dataset
        columns = {name: list(prompts[name]) for name in prompts.column_names}
    elif len(prompts) and all(isinstance(row, Mapping) for row in prompts):
        names = list(prompts[0])
        if any(set(row) != set(names) for row in prompts):
            raise GradeError(f"{argument}: its dictionaries have different keys. Give every row the same.")
        columns = {name: [row[name] for row in prompts] for name in names}
    else:
        return list(prompts), {}
    name = next((name for name in PROMPT_COLUMNS if name in columns), None)
    if name is None:
        raise GradeError(
            f"{argument} has the columns {', '.join(columns) or 'none'}, and none called prompt or messages. Rename "
            "the one that holds the prompts."
        )
    return columns.pop(name), columns


def _kind(value: Any) -> PromptKind | None:
    if isinstance(value, str):
        return "texts"
    if isinstance(value, Sequence) and len(value) and all(isinstance(part, Mapping) for part in value):
        return "conversations" if all({"role", "content"} <= set(part) for part in value) else None
    integers = hasattr(value, "__iter__") and not isinstance(value, (bytes, Mapping))
    return "token ids" if integers and all(type(part) is int or _is_scalar(part) for part in value) else None


def _asked(conversation: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """A conversation up to where the assistant is to answer: a last answer of data for fine-tuning is left off."""
    messages = [dict(message) for message in conversation]
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    return messages


def _is_scalar(value: Any) -> bool:
    """Whether it is an integer of numpy or torch."""
    return hasattr(value, "__index__") and not isinstance(value, bool)


def _check_ids(rows: list[list[int]], tokenizer: PreTrainedTokenizerBase, argument: str) -> None:
    known = set(tokenizer.get_vocab().values())
    for number, row in enumerate(rows):
        unknown = next((i for i in row if i not in known), None)
        if unknown is not None:
            raise GradeError(f"{argument}[{number}] holds the id {unknown}, which the tokenizer does not know.")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


class GivenTask(Task):
    """Prompts by split, as a program gave them.

    Args:
        splits: "policy", "validation" and "test"; a missing one has no prompts.
    """

    def __init__(self, splits: Mapping[str, Prompts]):
        self.splits = splits

    @property
    def name(self) -> str:
        return NAME

    @contextmanager
    def replaced(self, split: str, prompts: Prompts) -> Iterator[None]:
        """Have other prompts in a split while the block runs."""
        before, self.splits = self.splits, {**self.splits, split: prompts}
        try:
            yield
        finally:
            self.splits = before

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max(len(row) for split in self.splits.values() for row in split.ids)

    def prompts(self, split: str, tokenizer: PreTrainedTokenizerBase, limit: int | None = None) -> list[list[int]]:
        return self.splits[split].ids[:limit] if split in self.splits else []

    def columns(self, split: str, index: Sequence[int]) -> dict[str, list]:
        """The data set's other columns at the prompts of these numbers."""
        return {name: [values[i] for i in index] for name, values in self.splits[split].columns.items()}

    def conversations(self, split: str, index: Sequence[int]) -> list[list[dict[str, str]]] | None:
        """The messages of these prompts; None where prompts are no conversations."""
        found = self.splits[split].conversations
        return None if found is None else [found[i] for i in index]

    def describe(self) -> dict[str, Any]:
        """Kind and, per split, size and hash of the prompts and their columns.

        Raises:
            GradeError: a column holds what cannot be written as JSON, by which a run could not know it again.
        """
        return {
            "task": NAME,
            "dataset": "prompts given in Python",
            "prompts": next(iter(self.splits.values())).kind,
            "splits": {
                name: {"examples": len(split.ids), "sha256": sha256_of(_rows(split))}
                for name, split in self.splits.items()
            },
        }


def _rows(split: Prompts) -> list[str]:
    """What every prompt and its columns say, with the columns' names: rewards are called by them."""
    names = sorted(split.columns)
    columns = [[_written(value, name) for value in split.columns[name]] for name in names]
    return [
        json.dumps([ids, dict(zip(names, cells, strict=True))]) for ids, *cells in zip(split.ids, *columns, strict=True)
    ]


def _written(value: Any, column: str) -> str:
    """A value of a column as JSON; arrays, whose repr leaves out their middle, as lists."""
    try:
        return json.dumps(value, default=lambda part: part.tolist())
    except (TypeError, ValueError, AttributeError) as error:
        raise GradeError(
            f"the prompts' column {column!r} holds {_short(value)}, which is no JSON: the run could not know its data "
            "again. Write it as text, numbers or lists, or leave the column out."
        ) from error

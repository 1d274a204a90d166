"""Prompts that a program hands over: texts, token ids, conversations, or the rows of a data set with other columns."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from grade.config import TokenizerConfig
from grade.errors import GradeError
from grade.tasks.base import Task, sha256_of
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
    """

    ids: list[list[int]]
    conversations: list[list[dict[str, str]]] | None
    columns: dict[str, list]


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
    kinds = {_kind(value) for value in values}
    if len(kinds) > 1 or "" in kinds:
        number, wrong = next((n, v) for n, v in enumerate(values) if _kind(v) == "" or _kind(v) != _kind(values[0]))
        odd = f"unlike the first ({type(values[0]).__name__})" if _kind(wrong) else "which is no prompt"
        raise GradeError(f"{argument}[{number}] is {_short(wrong)}, {odd}. {FORMS}, all of one kind.")
    conversations, kind = None, kinds.pop()
    if kind == "text" and chat is not None and chat.chat:
        values, kind = [[{"role": "user", "content": value}] for value in values], "chat"
    if kind == "text":
        ids = encode(tokenizer, values, None)
    elif kind == "ids":
        ids = [list(map(int, value)) for value in values]
        _check_ids(ids, tokenizer, argument)
    else:
        conversations = [_asked(value) for value in values]
        ids = encode_chats(tokenizer, conversations, chat)
    empty = next((number for number, row in enumerate(ids) if not row), None)
    if empty is not None:
        raise GradeError(f"{argument}[{empty}] has no tokens: there is nothing to continue. Leave it out.")
    return Prompts(ids, conversations, columns)


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


def _kind(value: Any) -> str:
    if isinstance(value, str):
        return "text"
    if isinstance(value, Sequence) and len(value) and all(isinstance(part, Mapping) for part in value):
        return "chat" if all({"role", "content"} <= set(part) for part in value) else ""
    integers = hasattr(value, "__iter__") and not isinstance(value, (bytes, Mapping))
    return "ids" if integers and all(type(part) is int or _is_scalar(part) for part in value) else ""


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
        return {
            "task": NAME,
            "dataset": "prompts given in Python",
            "splits": {
                name: {"examples": len(split.ids), "sha256": sha256_of(_rows(split))}
                for name, split in self.splits.items()
            },
        }


def _rows(split: Prompts) -> list[str]:
    columns = [split.columns[name] for name in sorted(split.columns)]
    return [json.dumps([ids, *rest], default=repr) for ids, *rest in zip(split.ids, *columns, strict=True)]

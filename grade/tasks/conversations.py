"""Prompts and pairs of answers as data sets write them: texts, token ids, or lists of messages."""

from __future__ import annotations

import os.path
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from grade.config import TokenizerConfig
from grade.errors import GradeError
from grade.tasks.base import Message, PairIds
from grade.tasks.encoding import encode, encode_chats

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PromptKind = Literal["texts", "token ids", "conversations"]
Prompt = str | list[int] | list[Message]


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt, of which the first was preferred.

    Attributes:
        prompt: a text, empty where the answers stand by themselves, or the messages before the answer.
    """

    prompt: str | list[Message]
    chosen: str
    rejected: str


def kind_of(prompt: Prompt) -> PromptKind:
    """What a prompt that `read_prompt` has given is."""
    if isinstance(prompt, str):
        return "texts"
    return "token ids" if isinstance(prompt[0], int) else "conversations"


def read_prompt(value: Any, where: str) -> Prompt | None:
    """A cell of a prompt column, or None where it is empty. A last message of the assistant is an answer and left off.

    Raises:
        GradeError: it is something else than a text, token ids or messages; it starts with `where`.
    """
    if value is None or isinstance(value, str):
        return value if value is not None and value.strip() else None
    if isinstance(value, (list, tuple)):
        entries = list(value)
        if all(type(entry) is int for entry in entries):
            return entries or None
        if all(isinstance(entry, dict) for entry in entries):
            messages = read_messages(entries, where)
            while messages and messages[-1]["role"] == "assistant":
                messages.pop()
            return messages if any(message["role"] != "system" for message in messages) else None
        odd = next(entry for entry in entries if type(entry) is not int and not isinstance(entry, dict))
        found = f"a list with {type(odd).__name__} values"
    else:
        found = f"{type(value).__name__} values"
    raise GradeError(
        f"{where} holds {found}: a prompt is a string, a list of token ids, or a list of messages with role and "
        "content."
    )


def read_messages(entries: Sequence[Any], where: str) -> list[Message]:
    """A conversation, without the fields that its rows leave empty.

    Raises:
        GradeError: a message has no role or a content that is no text; it starts with `where`.
    """
    messages = []
    for entry in entries:
        fields = {name: value for name, value in entry.items() if value is not None} if isinstance(entry, dict) else {}
        for name in ("role", "content"):
            if not isinstance(fields.get(name), str):
                raise GradeError(
                    f"{where} has a message whose {name} is {type(fields.get(name)).__name__}: every message needs a "
                    "role and a content, both strings."
                )
        messages.append(fields)
    return messages


def read_pair(prompt: Any, chosen: Any, rejected: Any, where: str) -> Pair | None:
    """A row of pairs as TRL has them, or None where nothing tells the answers apart.

    Args:
        prompt: a text or messages; None, or a text beside whole conversations: what both begin with is the prompt.
        chosen, rejected: texts, or messages of which the last is the answer.

    Raises:
        GradeError: an answer is missing, of several messages, or of another kind than the other or the prompt.
    """
    if isinstance(chosen, str) and isinstance(rejected, str) and (prompt is None or isinstance(prompt, str)):
        if prompt is None:
            prompt = os.path.commonprefix([chosen, rejected])
            if prompt != chosen and prompt != rejected:  # back to a word's end; the space belongs to the answer
                prompt = prompt[: prompt.rfind(" ") + 1].rstrip(" ")
            chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
        return Pair(prompt, chosen, rejected) if chosen != rejected else None
    if not isinstance(chosen, (list, tuple)) or not isinstance(rejected, (list, tuple)):
        raise GradeError(
            f"{where} holds {type(chosen).__name__} as chosen, {type(rejected).__name__} as rejected and "
            f"{type(prompt).__name__} as prompt: all must be strings, or all lists of messages."
        )
    first, second = read_messages(chosen, where), read_messages(rejected, where)
    if isinstance(prompt, str):  # beside conversations, a copy of their first message
        prompt = as_messages(prompt) if len(first) == len(second) == 1 else None
    before = read_messages(prompt or [], where)
    shared = 0
    if not before:
        while shared < min(len(first), len(second)) - 1 and first[shared] == second[shared]:
            shared += 1
        before = first[:shared]
    first, second = first[shared:], second[shared:]
    if len(first) != 1 or len(second) != 1:
        raise GradeError(
            f"{where} has answers of {len(first)} and {len(second)} messages after the prompt: each must be one "
            "message."
        )
    if not before:
        raise GradeError(f"{where} has answers without a prompt: put the messages before them in front of both.")
    if first[0]["content"] == second[0]["content"]:
        return None
    return Pair(before, first[0]["content"], second[0]["content"])


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], chat: TokenizerConfig | None = None
) -> list[list[int]]:
    """Token ids of prompts of one kind, not cut: conversations through the chat template, and texts too if `chat` says.

    Raises:
        GradeError: there is no usable template, or an id that the tokenizer does not have.
    """
    chat = chat or TokenizerConfig()
    if not prompts:
        return []
    kind = kind_of(prompts[0])
    if kind == "conversations" or (kind == "texts" and chat.chat):
        return encode_chats(tokenizer, [as_messages(prompt) for prompt in prompts], chat)
    if kind == "texts":
        return encode(tokenizer, [str(prompt) for prompt in prompts], None)
    largest = max(tokenizer.get_vocab().values())
    rows = [[token for token in prompt if isinstance(token, int)] for prompt in prompts]
    wrong = next((token for row in rows for token in row if not 0 <= token <= largest), None)
    if wrong is not None:
        raise GradeError(
            f"task.prompt_column: a prompt has the token id {wrong}, but the ids of model.name are 0 to {largest}. "
            "Write the ids of this model's tokenizer, or texts."
        )
    return rows


def as_messages(prompt: Any) -> list[Message]:
    """A conversation as it is, and a text as a user's message."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def encode_pairs(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair], chat: TokenizerConfig | None = None
) -> list[PairIds]:
    """Pairs as the policy would see them: the prompt as in training, then the answer's text without special tokens."""
    prompts: list[list[int]] = [[] for _ in pairs]
    told = [i for i, pair in enumerate(pairs) if pair.prompt]
    for i, row in zip(told, encode_prompts(tokenizer, [pairs[i].prompt for i in told], chat), strict=True):
        prompts[i] = row
    answers = [
        encode(tokenizer, [getattr(pair, which) for pair in pairs], None, special_tokens=False)
        for which in ("chosen", "rejected")
    ]
    return [PairIds(*row) for row in zip(prompts, *answers, strict=True)]

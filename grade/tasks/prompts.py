"""Prompts as they are, without labels: texts, token ids or conversations, with further columns for reward functions.

Data with pairs of answers (`task.label_type: pairs`) also trains a reward head, on rows that give no prompts.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from grade.config import TaskConfig, TokenizerConfig
from grade.errors import GradeError
from grade.tasks.base import Message, PairIds, Task, sha256_of
from grade.tasks.conversations import (
    Pair,
    Prompt,
    PromptKind,
    as_messages,
    encode_pairs,
    encode_prompts,
    kind_of,
    read_pair,
    read_prompt,
)
from grade.tasks.encoding import opening_ids
from grade.tasks.reading import Parts, filled, read_data, where
from grade.tasks.texts import shuffled

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PARTS = Parts(("train",), ("validation", "test"), bare=True)
SPLITS = ("reward", "policy", "validation", "test")
_ENCODED_TOGETHER = 1024


class Row(NamedTuple):
    """A row of the data.

    Attributes:
        id: where it came from, for example `train/17`.
        columns: all but the prompt.
        pair: two answers to the prompt, where the data has them.
    """

    id: str
    prompt: Prompt
    columns: dict[str, Any]
    pair: Pair | None = None


def load(settings: TaskConfig, chat: TokenizerConfig | None = None) -> PromptTask:
    """Read the prompts that `settings.dataset` names and cut them into splits.

    Raises:
        GradeError: the data is missing, unreachable, empty, lacks a column or rows, or has something else in them.
    """
    return read_data(settings.dataset, PARTS, lambda data: prompt_task(data, settings, chat, source=settings.dataset))


def prompt_task(
    data: Mapping[str, list], settings: TaskConfig, chat: TokenizerConfig | None = None, *, source: str
) -> PromptTask:
    """Cut a task from loaded parts; a validation or test part that is missing is cut from the training rows.

    Args:
        data: "train", and "validation" and "test" where there are such, each a list of `datasets.Dataset`.
        source: for messages and the record.

    Raises:
        GradeError: as `load`.
    """
    read = {part: _Part(part, rows, settings, source) for part, rows in data.items()}
    train = shuffled(read["train"].usable, settings.split_seed)
    fifth = max(1, len(train) // 5)
    sizes = {"reward": min(settings.reward_examples, 2 * fifth) if settings.label_type == "pairs" else 0}
    for split in ("validation", "test"):
        sizes[split] = 0 if split in read else min(getattr(settings, f"{split}_examples"), fifth)
    if sum(sizes.values()) >= len(train):
        notes = ", ".join(note.removeprefix("data: ") for note in read["train"].notes())
        left_out = f" ({notes})" if notes else ""
        raise GradeError(
            f"{where(source, 'train')} has {len(train)} usable rows{left_out}: at least {1 + sum(sizes.values())} are "
            f"needed for {', '.join(name for name, size in sizes.items() if size)} and training."
        )
    splits, start = {}, 0
    for split, size in {**sizes, "policy": settings.policy_examples}.items():
        splits[split] = read["train"].rows(train[start : start + size])
        start += size
    for split in set(read) - {"train"}:
        chosen = shuffled(read[split].usable, settings.split_seed)
        splits[split] = read[split].rows(chosen[: getattr(settings, f"{split}_examples")])
    kinds = {kind_of(row.prompt) for rows in splits.values() for row in rows}
    if len(kinds) > 1:
        raise GradeError(f"task.dataset={source} mixes prompts that are {' and '.join(sorted(kinds))}: use one kind.")
    (kind,) = kinds
    _check_chat(kind, settings, chat or TokenizerConfig(), source)
    said = [note for part in read.values() for note in part.notes()]
    cut = [split for split in ("validation", "test") if sizes[split]]
    counts = ", ".join(f"{len(splits[split])} {split}" for split in SPLITS if splits[split])
    said.insert(0, f"data: {counts} rows" + (f"; {' and '.join(cut)} cut from the training data" if cut else ""))
    return PromptTask(source, settings, kind, splits, chat, tuple(said))


def _check_chat(kind: PromptKind, settings: TaskConfig, chat: TokenizerConfig, source: str) -> None:
    """Refuse settings of conversations where there are none, and cutting where there are."""
    conversations = kind == "conversations" or (kind == "texts" and chat.chat)
    if conversations and settings.long_prompts == "cut":
        raise GradeError(
            "task.long_prompts is cut, but a conversation cannot be: its template would lose its beginning. Set it to "
            "leave_out and raise task.prompt_max_tokens."
        )
    if not conversations and chat != TokenizerConfig():
        fix = "Set tokenizer.chat to true" if kind == "texts" else "Write the template into the ids"
        raise GradeError(
            f"tokenizer.system_prompt and tokenizer.chat_template_kwargs are for conversations, but the prompts of "
            f"task.dataset={source} are {kind}. {fix}, or leave them out."
        )


class _Part:
    """A part of the data: which rows can be used, and what they say.

    Attributes:
        usable: numbers of the rows with a prompt, and with two answers that differ where pairs are asked for.
    """

    def __init__(self, part: str, datasets: list, settings: TaskConfig, source: str):
        self.part, self.settings, self.where = part, settings, where(source, part)
        self.datasets = filled(source, part, datasets)
        self.prompts: list[Prompt | None] = []
        self.pairs: list[Pair | None] = []
        self.counts: Counter[str] = Counter()
        for rows in self.datasets:
            self._read(rows)
        self.usable = [number for number, prompt in enumerate(self.prompts) if prompt is not None]
        if not self.usable:
            raise GradeError(f"{self.where} has {self._why()}.")

    def _why(self) -> str:
        """What it has that makes every row unusable."""
        rows, equal = len(self.prompts), self.counts["equal"]
        if not equal:
            return f"no prompt: all {rows} rows are empty"
        columns = f"{self.settings.chosen_column!r} and {self.settings.rejected_column!r}"
        others = f", and {rows - equal} have no prompt" if rows > equal else ""
        return (
            f"no pair to learn from: in {equal} of {rows} rows the answers in the columns {columns} are equal{others}. "
            "Name the answers with task.chosen_column and task.rejected_column, or use other data"
        )

    def _read(self, rows: Any) -> None:
        pairs = self.settings.label_type == "pairs"
        column = self._prompt_column(rows.column_names)
        names = [column, *((self.settings.chosen_column, self.settings.rejected_column) if pairs else ())]
        missing = [name for name in names[1:] if name not in rows.column_names]
        if missing:
            raise GradeError(
                f"{self.where} has no column {missing[0]!r}: task.label_type=pairs needs task.chosen_column and "
                f"task.rejected_column among {', '.join(rows.column_names)}."
            )
        cells = rows.select_columns([name for name in names if name is not None]).with_format(None)[:]
        for number in range(len(rows)):
            given = None if column is None else cells[column][number]
            prompt = read_prompt(given, f"{self.where}, column {column!r},")
            if isinstance(given, list) and given and isinstance(given[-1], dict):
                self.counts["answers"] += given[-1].get("role") == "assistant"
            pair = None
            if pairs:
                chosen, rejected = (cells[name][number] for name in names[1:])
                pair = read_pair(prompt, chosen, rejected, f"{self.where}, row {number},")
                self.counts["equal"] += pair is None
                prompt = pair.prompt or None if pair is not None else None
            self.counts["empty"] += prompt is None and (pair is not None or not pairs)
            self.prompts.append(prompt)
            self.pairs.append(pair)

    def _prompt_column(self, names: Sequence[str]) -> str | None:
        """The column with the prompts; None for pairs that hold them in both answers."""
        asked = self.settings.prompt_column
        if asked in names:
            return asked
        if asked == TaskConfig().prompt_column:
            if "messages" in names:
                return "messages"
            if list(names) == ["text"]:  # of a text file
                return "text"
            if self.settings.label_type == "pairs":
                return None
        raise GradeError(f"{self.where} has no column {asked!r}: set task.prompt_column to one of {', '.join(names)}.")

    def rows(self, numbers: Sequence[int]) -> list[Row]:
        """The rows with these numbers, in this order, with all their columns."""
        found, start = {}, 0
        for rows in self.datasets:
            own = sorted(number for number in numbers if start <= number < start + len(rows))
            prompt = self._prompt_column(rows.column_names)
            others = [name for name in rows.column_names if name != prompt]
            chosen: dict[str, list] = {}
            if others and own:  # `datasets` cannot index rows without columns
                chosen = rows.select([number - start for number in own]).select_columns(others).with_format(None)[:]
            for place, number in enumerate(own):
                found[number] = {name: chosen[name][place] for name in others}
            start += len(rows)
        return [
            Row(f"{self.part}/{number}", given, found[number], self.pairs[number])
            for number in numbers
            if (given := self.prompts[number]) is not None
        ]

    def notes(self) -> Iterator[str]:
        words = {
            "empty": "rows without a prompt are left out",
            "equal": "pairs whose answers are equal are left out",
            "answers": "conversations end with an answer of the assistant, which is left off",
        }
        yield from (f"data: {self.counts[key]} {text} ({self.part})" for key, text in words.items() if self.counts[key])


@dataclass(frozen=True)
class PromptTask(Task):
    """Disjoint splits of prompts.

    Attributes:
        source: where they come from, for the record.
        settings: section `task`.
        kind: what the prompts are.
        splits: rows of "policy", "validation" and "test", and of "reward" where a head learns from pairs.
        chat: section `tokenizer`.
        said: what was left out and cut when the data was read.
        kept: rows that `prompts` has last given of each split, in order.
        too_long: how many it has left out for their length.
    """

    source: str
    settings: TaskConfig
    kind: PromptKind
    splits: dict[str, list[Row]]
    chat: TokenizerConfig | None = None
    said: tuple[str, ...] = ()
    kept: dict[str, list[Row]] = field(default_factory=dict, repr=False, compare=False)
    too_long: dict[str, int] = field(default_factory=dict, repr=False, compare=False)

    @property
    def name(self) -> str:
        return self.settings.name

    def __post_init__(self) -> None:
        if self.settings.label_type == "pairs":
            object.__setattr__(self, "label_type", "pairs")

    def rows(self, split: str) -> list[Row]:
        """The rows of a split named in `SPLITS`; any other name raises ValueError."""
        if split not in SPLITS:
            raise ValueError(f"no split {split!r}: there are {', '.join(SPLITS)}")
        return self.splits.get(split, [])

    def prompts(self, split: str, tokenizer: PreTrainedTokenizerBase, limit: int | None = None) -> list[list[int]]:
        """Token ids of a split's prompts; the chat template is applied to conversations, with the generation prompt.

        Raises:
            GradeError: all are longer than task.prompt_max_tokens, or they cannot be encoded.
        """
        rows = self.rows(split)
        wanted = len(rows) if limit is None else limit
        kept: list[Row] = []
        ids: list[list[int]] = []
        lengths: list[int] = []  # of what was left out
        start = 0
        while len(kept) < wanted and start < len(rows):
            batch = rows[start : start + min(_ENCODED_TOGETHER, wanted - len(kept))]
            start += len(batch)
            encoded = encode_prompts(tokenizer, [row.prompt for row in batch], self.chat)
            for row, whole in zip(batch, encoded, strict=True):
                fitting = self._fitted(row.prompt, whole, tokenizer)
                if fitting:
                    kept.append(row)
                    ids.append(fitting)
                else:
                    lengths.append(len(whole))
        if rows and wanted and not kept:
            raise GradeError(
                f"task.prompt_max_tokens is {self.settings.prompt_max_tokens}, and of the {len(lengths)} {split} "
                f"prompts of {self.source} none has 1 to so many tokens (the shortest has {min(lengths)}). Raise it"
                + (", or set task.long_prompts to cut." if self.kind != "conversations" else ".")
            )
        self.kept[split], self.too_long[split] = kept, len(lengths)
        return ids

    def _fitted(self, prompt: Prompt, ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """A prompt within the limit, cut to its last tokens if the settings say so; else empty."""
        longest = self.settings.prompt_max_tokens
        if len(ids) <= longest:
            return ids
        if self.settings.long_prompts != "cut":
            return []
        before = opening_ids(tokenizer, prompt) if isinstance(prompt, str) else []
        room = longest - len(before)
        return [*before, *ids[-room:]] if room > 0 else []

    def pairs(self, split: str, tokenizer: PreTrainedTokenizerBase) -> Sequence[PairIds]:
        pairs = [row.pair for row in self.rows(split) if row.pair is not None]
        return encode_pairs(tokenizer, pairs, self.chat)

    def columns(self, split: str, index: Sequence[int]) -> dict[str, list[Any]]:
        rows = self._given(split, index)
        names = dict.fromkeys(name for row in self.kept[split] for name in row.columns)
        return {name: [row.columns.get(name) for row in rows] for name in names}

    def conversations(self, split: str, index: Sequence[int]) -> list[list[Message]] | None:
        """As of every `Task`, without the system prompt of the settings."""
        rows = self._given(split, index)
        told = self.kind == "conversations" or (self.chat is not None and self.chat.chat)
        return [as_messages(row.prompt) for row in rows] if told else None

    def _given(self, split: str, index: Sequence[int]) -> list[Row]:
        if split not in self.kept:
            raise ValueError(f"prompts({split!r}, ...) was not called: its order is what the index counts")
        return [self.kept[split][i] for i in index]

    def notes(self) -> list[str]:
        longest = self.settings.prompt_max_tokens
        return [
            *self.said,
            *(
                f"data: {count} {split} prompts are left out: longer than task.prompt_max_tokens={longest}"
                for split, count in self.too_long.items()
                if count
            ),
        ]

    def describe(self) -> dict[str, Any]:
        """Source, kind and, per split, size and hashes of rows and of all that they say."""
        return {
            "task": self.name,
            "dataset": self.source,
            "split_seed": self.settings.split_seed,
            "prompts": self.kind,
            **({} if self.label_type is None else {"label_type": self.label_type}),
            "splits": {
                split: {
                    "examples": len(rows),
                    "ids_sha256": sha256_of(row.id for row in rows),
                    "texts_sha256": sha256_of(json.dumps([row.prompt, row.columns], default=str) for row in rows),
                }
                for split in SPLITS
                if (rows := self.rows(split))
            },
        }

"""Tasks: labelled texts, the splits that are cut from them, and the openings that serve as prompts.

A task is five disjoint lists of examples. The reward head learns from `reward`, the policy continues openings
of `policy`, `validation` picks the checkpoint, `test` is looked at once, and `judge` trains the judge of
comparisons. Everything that decides what a model reads (cleaning, cutting) is in this file, and special tokens are
in `grade.tasks.encoding`, so that every task, the policy and the reward read the same. Nothing heavy is imported here.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from grade.config import TaskConfig
from grade.errors import GradeError
from grade.tasks.base import Example, Labels, LabelType, Task, sha256_of
from grade.tasks.encoding import encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_Row = TypeVar("_Row")
SPLITS = ("reward", "policy", "validation", "test", "judge")

_BREAK = re.compile(r"<br\s*/?>", re.IGNORECASE)

# Where a sentence ends. It errs towards missing an end: that only lengthens a prompt, which the limits in
# characters and tokens then cut, while a false end ("I met Mr.") would spoil it.
_SENTENCE_END = re.compile(
    r"(?<![.!?…])"  # start of a run of marks, so that a long row of dots is read once
    r"(?<!\b[A-HJ-Z])"  # an initial (J. Smith, U.S.), but 'I' may end a sentence
    r"(?<!\b[MD]r)(?<!\bMrs)(?<!\bMs)(?<!\bSt)(?<!\bvs)"  # titles
    r"(?<!\b[a-z]\.[a-z])"  # e.g., i.e., p.m.
    r"[.!?…]+[\"'”’)\]]*"  # the marks, with closing quotes and brackets
    r"(?=\s(?![a-z]))"  # then a space and no lower-case letter ('Well... maybe' goes on; 3.5 has no space)
    r"|[。！？]+[”’」』）]*"  # scripts that put no space between sentences
)


def clean(text: str) -> str:
    """`text` with HTML line breaks as spaces and every run of whitespace as one space."""
    return " ".join(_BREAK.sub(" ", text).split())


def opening(text: str, sentences: int, max_chars: int) -> str:
    """The first sentences of a cleaned text.

    Args:
        text: cleaned text (see `clean`).
        sentences: at most this many sentences.
        max_chars: at most this many characters, cut at a word's end. A single longer word is cut where it
            stands: scripts without spaces would come out empty otherwise.

    Returns:
        A prefix of `text` without trailing whitespace; empty only if `text` is.
    """
    end = len(text)
    for count, match in enumerate(_SENTENCE_END.finditer(text), start=1):
        if count == sentences:
            end = match.end()
            break
        if match.end() >= max_chars:
            break
    if end > max_chars:
        end = max_chars
        if not text[end].isspace():
            last_space = text.rfind(" ", 0, end)
            end = last_space if last_space > 0 else end
    return text[:end].rstrip()


def shuffled(examples: Sequence[_Row], seed: int) -> list[_Row]:
    """`examples` in an order that depends on `seed` and their number only.

    Sorted by `random()` keys: of Python's generators, that sequence alone is promised to stay the same in
    later versions, and `Random.shuffle` is not.
    """
    generator = random.Random(seed)
    keys = [generator.random() for _ in examples]
    return [examples[i] for i in sorted(range(len(examples)), key=keys.__getitem__)]


@dataclass(frozen=True)
class TextTask(Task):
    """Five disjoint splits of labelled texts, and the prompts made from them.

    Attributes:
        source: where the texts come from, for the record.
        settings: the `task` section of the configuration.
        reward: trains the reward head.
        policy: training prompts.
        validation: prompts and texts for choosing a checkpoint and judging the head.
        test: prompts and texts for the final evaluation.
        judge: trains the judge of `grade compare`, which no method sees; may be empty.
        labels: what the labels of the data mean; None where they were not read from data.
        label_type: None where the texts are unlabelled: `reward` and `judge` are of no use then.
    """

    source: str
    settings: TaskConfig
    reward: list[Example]
    policy: list[Example]
    validation: list[Example]
    test: list[Example]
    judge: list[Example] = field(default_factory=list)
    labels: Labels | None = None
    label_type: LabelType | None = "classes"

    def __post_init__(self) -> None:
        ids = [example.id for split in SPLITS for example in self.examples(split)]
        if len(set(ids)) != len(ids):
            raise AssertionError(f"{len(ids) - len(set(ids))} ids occur twice in the splits of {self.source}")

    @property
    def name(self) -> str:
        return self.settings.name

    def examples(self, split: str) -> list[Example]:
        """The examples of a split named in `SPLITS`; any other name raises ValueError."""
        if split not in SPLITS:
            raise ValueError(f"no split {split!r}: there are {', '.join(SPLITS)}")
        return getattr(self, split)

    def openings(self, split: str) -> Iterator[str]:
        """Openings of a split's texts, in order, cut to `prompt_sentences` and `prompt_max_chars`; may be
        empty."""
        for example in self.examples(split):
            yield opening(example.text, self.settings.prompt_sentences, self.settings.prompt_max_chars)

    def prompts(self, split: str, tokenizer: PreTrainedTokenizerBase, limit: int | None = None) -> list[list[int]]:
        """Token ids of the openings of a split named in `SPLITS`. Those that come out empty are skipped."""
        texts = [text for text in self.openings(split) if text]
        wanted = len(texts) if limit is None else limit
        prompts: list[list[int]] = []
        start = 0
        while len(prompts) < wanted and start < len(texts):
            # As many as are still missing: more than one round only where a tokenizer knows no token of a
            # text.
            batch = texts[start : start + wanted - len(prompts)]
            start += len(batch)
            prompts += [row for row in encode(tokenizer, batch, self.settings.prompt_max_tokens) if row]
        return prompts

    def describe(self) -> dict[str, Any]:
        """What a run records about its data, ready for JSON: source, seed and, per split, size and two
        hashes.

        `ids_sha256` tells whether two runs used the same rows in the same order, `texts_sha256` whether the
        rows said the same (it covers texts and labels, not ids).
        """
        splits = {}
        for name in SPLITS:
            examples = self.examples(name)
            splits[name] = {
                "examples": len(examples),
                **({"positive": sum(e.label or 0 for e in examples)} if self.label_type == "classes" else {}),
                "ids_sha256": sha256_of(example.id for example in examples),
                "texts_sha256": sha256_of(
                    example.text if example.label is None else f"{example.label} {example.text}" for example in examples
                ),
            }
        return {
            "task": self.name,
            "dataset": self.source,
            "split_seed": self.settings.split_seed,
            **({} if self.label_type == "classes" else {"label_type": self.label_type}),
            **({} if self.labels is None else {"labels": asdict(self.labels)}),
            "splits": splits,
            "texts_in_two_splits": self.repeated_texts(),
        }

    def repeated_texts(self) -> dict[str, int]:
        """How many distinct texts stand in two splits, by pair. Rows are never shared, but data may repeat itself."""
        texts = {name: {example.text for example in self.examples(name)} for name in SPLITS}
        pairs = [(a, b) for i, a in enumerate(SPLITS) for b in SPLITS[i + 1 :]]
        return {f"{a} and {b}": len(texts[a] & texts[b]) for a, b in pairs}


def cut_splits(
    train: Sequence[Example],
    test: Sequence[Example],
    settings: TaskConfig,
    source: str,
    labels: Labels | None = None,
    *,
    trains_head: bool = True,
) -> TextTask:
    """Cut a task from the rows of a training and a test file.

    One shuffle of the training rows (files are often sorted by label), then consecutive stretches, so
    no row can be in two. The test rows are shuffled by the same seed: their first n are a random subset.

    Args:
        trains_head: false: reward examples are as many as are left beside the other splits, and need no labels.

    Raises:
        GradeError: too few training rows, or reward examples with a single label.
    """
    others = settings.policy_examples + settings.validation_examples
    learnt = settings.reward_examples if trains_head else max(0, min(settings.reward_examples, len(train) - others))
    sizes = (learnt, settings.policy_examples, settings.validation_examples)
    if sum(sizes) > len(train):
        raise GradeError(
            f"{'task.reward_examples + ' if trains_head else ''}task.policy_examples + task.validation_examples = "
            f"{' + '.join(map(str, sizes if trains_head else sizes[1:]))} = {sum(sizes)}, but the training data of "
            f"{source} has {len(train)} rows. Lower one of the {'three' if trains_head else 'two'} or use more data."
        )
    rows = shuffled(train, settings.split_seed)
    first, second, third = sizes[0], sizes[0] + sizes[1], sum(sizes)
    reward = rows[:first]
    if trains_head and len({example.label for example in reward}) < 2:
        raise GradeError(
            f"All {len(reward)} reward examples have the same label: raise task.reward_examples "
            "or change task.split_seed."
        )
    label_type = (settings.label_type or "classes") if any(row.label is not None for row in train) else None
    judged = settings.judge_examples if label_type == "classes" else 0
    return TextTask(
        source=source,
        settings=settings,
        reward=reward,
        policy=rows[first:second],
        validation=rows[second:third],
        test=shuffled(test, settings.split_seed),
        judge=rows[third : third + judged],
        labels=labels,
        label_type=label_type if label_type != "pairs" else None,
    )

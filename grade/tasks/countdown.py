"""A task with a program as its judge: reach a target from given numbers with + - * /, each number at most once.

Puzzles are written by a seeded generator, so there is nothing to download; `grade.tasks.arithmetic` reads what a
model answers and scores it.
"""

from __future__ import annotations

import hashlib
import random
import re
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from grade.config import TaskConfig, TokenizerConfig
from grade.errors import GradeError
from grade.tasks.base import Task, sha256_of
from grade.tasks.encoding import encode, encode_chats

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPLITS = ("policy", "validation", "test")
PARTS = (*SPLITS, "pretraining")
"""A puzzle's hash says which part it belongs to, so that no puzzle is in two, whatever the sizes and seeds; the last
one trains the model of `grade.built_in.countdown_model`."""
TEST_PUZZLES = 2000

# A part takes about one puzzle in four, and most random ones are new until a difficulty has few left.
_ATTEMPTS_PER_PUZZLE = 2000

_RULES = (
    "Reach the target number with the operations + - * / from the given numbers. Use each given number at most once, "
    "and at most {max_steps} operations. A result may be used once in a later step.\n"
    "Numbers: {numbers}\nTarget: {target}\n"
    "Answer with one step per line, such as\n50 + 25 = 75\n75 + 7 = 82\nor with one expression, such as\n"
    "50 + 25 + 7\nand with nothing else. If you think first, put the answer between <answer> and </answer>."
)

Step = tuple[int, str, int, int]


@dataclass(frozen=True)
class Puzzle:
    """Numbers and a target that can be reached from them.

    Attributes:
        numbers: positive integers, in any order.
        target: positive, none of `numbers`.
        solution: steps (a, operation, b, result) that use all numbers and end with the target.
    """

    numbers: tuple[int, ...]
    target: int
    solution: tuple[Step, ...]

    @property
    def key(self) -> str:
        """The same for two puzzles that differ only in the order of their numbers."""
        return f"{sorted(self.numbers)} {self.target}"

    @property
    def prompt(self) -> str:
        """One line, with its end."""
        return f"numbers={','.join(map(str, self.numbers))} target={self.target}\n"

    @property
    def answer(self) -> str:
        """The solution as a list of steps, one per line."""
        return "\n".join(f"{a}{operation}{b}={result}" for a, operation, b, result in self.solution)


_PROMPT = re.compile(r"\s*(?:numbers\s*[=:])?\s*(\d+(?:[\s,]+\d+)*)[\s,]+target\s*[=:]\s*(\d+)\s*", re.IGNORECASE)


def puzzle_of(text: str) -> Puzzle:
    """The puzzle that a person asks for, such as `numbers=3,5,7 target=22`; it has no solution yet, and need not have
    one.

    Raises:
        GradeError: it is written in another way.
    """
    found = _PROMPT.fullmatch(text)
    if found is None:
        raise GradeError(
            f"{text.strip()!r} is no puzzle of task.name=countdown: write one such as numbers=3,5,7 target=22."
        )
    return Puzzle(tuple(int(number) for number in re.findall(r"\d+", found[1])), int(found[2]), ())


def write_puzzles(
    n: int, *, seed: int, operands: int, max_number: int, max_target: int, part: str, setting: str | None = None
) -> list[Puzzle]:
    """`n` puzzles, distinct up to the order of their numbers; the first m of them are those of `n` = m.

    Every puzzle starts from random numbers, which random operations merge two by two into the target. All results on
    the way are positive integers up to the larger of `max_number` and `max_target`, and nothing is multiplied or
    divided by 1. Of Python's generators only `random()` is used, which alone is promised to stay the same.

    Args:
        n: how many.
        seed: of the generator; another seed gives other puzzles, with some in common.
        operands: given numbers, so solutions have one step fewer. At least 2.
        max_number: given numbers are from 1 to this, at least 2.
        max_target: targets are from 1 to this.
        part: one of `PARTS`. Puzzles of different parts never coincide.
        setting: that says how many, for messages; None: the one that is named after the part.

    Raises:
        GradeError: there are not that many puzzles of this difficulty.
        ValueError: unknown part.
    """
    if part not in PARTS:
        raise ValueError(f"no part {part!r}: there are {', '.join(PARTS)}")
    generator = random.Random(f"{seed} {part}")
    seen: set[str] = set()
    puzzles: list[Puzzle] = []
    while len(puzzles) < n:
        for _ in range(_ATTEMPTS_PER_PUZZLE):
            puzzle = _write(generator, operands, max_number, max_target)
            if (
                puzzle.target <= max_target
                and puzzle.target not in puzzle.numbers
                and puzzle.key not in seen
                and _part(puzzle) == part
            ):
                break
        else:
            raise GradeError(
                f"There are hardly more than {len(puzzles)} {part} puzzles with task.countdown.operands={operands}, "
                f"max_number={max_number} and max_target={max_target}, but {n} are needed: raise one of the three"
                + (f" or lower {setting or f'task.{part}_examples'}." if part in ("policy", "validation") else ".")
            )
        seen.add(puzzle.key)
        puzzles.append(puzzle)
    return puzzles


def _write(generator: random.Random, operands: int, max_number: int, max_target: int) -> Puzzle:
    """A random puzzle, whose target may still be too large or a given number. There is always an operation: the
    difference of two numbers, the quotient 1 of equal ones, or 1 + 1."""
    numbers = tuple(1 + _below(generator, max_number) for _ in range(operands))
    largest = max(max_number, max_target)
    pool, steps = list(numbers), []
    while len(pool) > 1:
        a = pool.pop(_below(generator, len(pool)))
        b = pool.pop(_below(generator, len(pool)))
        a, b = max(a, b), min(a, b)
        results = {"+": a + b, "-": a - b, "*": a * b, "/": a // b}
        allowed = [
            operation
            for operation, result in results.items()
            if 0 < result <= largest and (operation in "+-" or b > 1) and (operation != "/" or a % b == 0)
        ]
        operation = allowed[_below(generator, len(allowed))]
        steps.append((a, operation, b, results[operation]))
        pool.append(results[operation])
    return Puzzle(numbers, pool[0], tuple(steps))


def _below(generator: random.Random, n: int) -> int:
    return int(generator.random() * n)


def _part(puzzle: Puzzle) -> str:
    return PARTS[hashlib.sha256(puzzle.key.encode()).digest()[0] % len(PARTS)]


def load(settings: TaskConfig, chat: TokenizerConfig | None = None) -> CountdownTask:
    """The puzzles that the settings ask for, and `TEST_PUZZLES` for the test.

    Raises:
        GradeError: this difficulty does not have so many puzzles, or takes more steps than are allowed.
    """
    difficulty = settings.countdown
    if difficulty.max_steps < difficulty.operands - 1:
        raise GradeError(
            f"task.countdown.max_steps is {difficulty.max_steps}, but puzzles of task.countdown.operands="
            f"{difficulty.operands} may need {difficulty.operands - 1} steps: raise the first or lower the second."
        )
    sizes = (settings.policy_examples, settings.validation_examples, TEST_PUZZLES)
    policy, validation, test = (
        write_puzzles(
            size,
            seed=settings.split_seed,
            operands=difficulty.operands,
            max_number=difficulty.max_number,
            max_target=difficulty.max_target,
            part=split,
        )
        for split, size in zip(SPLITS, sizes, strict=True)
    )
    return CountdownTask("built-in generator", settings, policy, validation, test, chat=chat)


@dataclass(frozen=True)
class CountdownTask(Task):
    """Three disjoint splits of puzzles, and their prompts; and further puzzles for a proxy of the reward.

    Attributes:
        source: where the puzzles come from, for the record.
        settings: the `task` section of the configuration.
        policy, validation, test: puzzles for training, for choosing a checkpoint, and for the final evaluation.
        by_prompt: the puzzle of every prompt that `prompts` has given out, by its token ids.
        chat: how the chat template is used, where the tokenizer has one.
    """

    source: str
    settings: TaskConfig
    policy: list[Puzzle]
    validation: list[Puzzle]
    test: list[Puzzle]
    by_prompt: dict[tuple[int, ...], Puzzle] = field(default_factory=dict, repr=False, compare=False)
    chat: TokenizerConfig | None = None

    @property
    def name(self) -> str:
        return self.settings.name

    @classmethod
    def prompt_of(
        cls, text: str, tokenizer: PreTrainedTokenizerBase, settings: TaskConfig, chat: TokenizerConfig
    ) -> list[int]:
        """As of every `Task`, of a puzzle as `puzzle_of` reads it, under the limit of `prompts`."""
        return cls("a person", settings, [puzzle_of(text)], [], [], chat=chat).prompts("policy", tokenizer)[0]

    @cached_property
    def reward(self) -> list[Puzzle]:
        """task.reward_examples puzzles for a proxy to learn from, in no split, written when they are asked for.

        They are what follows the validation puzzles in their part, so that every split stays what it is without them.

        Raises:
            GradeError: there are not that many puzzles of this difficulty.
        """
        settings, held_out = self.settings, {puzzle.key for puzzle in self.validation}
        puzzles = write_puzzles(
            len(held_out) + settings.reward_examples,
            seed=settings.split_seed,
            operands=settings.countdown.operands,
            max_number=settings.countdown.max_number,
            max_target=settings.countdown.max_target,
            part="validation",
            setting="task.reward_examples",
        )
        return [puzzle for puzzle in puzzles if puzzle.key not in held_out][: settings.reward_examples]

    def puzzles(self, split: str) -> list[Puzzle]:
        """The puzzles of a split named in `SPLITS`, or of "reward"; any other name raises ValueError."""
        if split not in (*SPLITS, "reward"):
            raise ValueError(f"no split {split!r}: there are {', '.join(SPLITS)}, and reward for a proxy")
        return getattr(self, split)

    def prompts(self, split: str, tokenizer: PreTrainedTokenizerBase, limit: int | None = None) -> list[list[int]]:
        """Token ids of the puzzles of a split, as `puzzles` has them: a chat message where the tokenizer has a chat
        template, which states the rules, and otherwise a line that a model must have been trained on.

        Raises:
            GradeError: a prompt is longer than `prompt_max_tokens` (cut, it would be another puzzle), the tokenizer
                does not tell two puzzles apart, or its chat template cannot be used.
        """
        puzzles = self.puzzles(split)[:limit]
        longest = self.settings.prompt_max_tokens
        if getattr(tokenizer, "chat_template", None):  # a tokenizer of one's own need not have the attribute
            chats = [[{"role": "user", "content": self._rules(p)}] for p in puzzles]
            rows = encode_chats(tokenizer, chats, self.chat)
        else:
            rows = encode(tokenizer, [puzzle.prompt for puzzle in puzzles], longest + 1)
        for puzzle, row in zip(puzzles, rows, strict=True):
            if len(row) > longest:
                raise GradeError(
                    f"task.prompt_max_tokens is {longest}, but the prompt of the puzzle {puzzle.prompt.strip()!r} is "
                    "longer, and a puzzle cannot be cut. Raise it."
                )
            if self.by_prompt.setdefault(tuple(row), puzzle) != puzzle:
                raise GradeError(
                    f"model.name: its tokenizer writes the puzzles {puzzle.prompt.strip()!r} and "
                    f"{self.by_prompt[tuple(row)].prompt.strip()!r} with the same tokens. Choose a model that knows "
                    "all digits."
                )
        return rows

    def _rules(self, puzzle: Puzzle) -> str:
        return _RULES.format(
            max_steps=self.settings.countdown.max_steps,
            numbers=" ".join(map(str, puzzle.numbers)),
            target=puzzle.target,
        )

    def describe(self) -> dict[str, Any]:
        """Seed, difficulty and, per split, size and hash."""
        difficulty = self.settings.countdown
        return {
            "task": self.name,
            "dataset": self.source,
            "split_seed": self.settings.split_seed,
            "operands": difficulty.operands,
            "max_number": difficulty.max_number,
            "max_target": difficulty.max_target,
            "max_steps": difficulty.max_steps,
            "partial_credit": difficulty.partial_credit,
            "splits": {
                split: {
                    "examples": len(self.puzzles(split)),
                    "texts_sha256": sha256_of(puzzle.prompt for puzzle in self.puzzles(split)),
                }
                for split in SPLITS
            },
        }

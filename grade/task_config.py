"""The settings of the tasks: where prompts come from and how they are cut."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Optional

JUDGED_BY_PROGRAM = ("countdown",)
"""Tasks whose reward is a program, without a gradient."""


@dataclass
class CountdownConfig:
    """The puzzles of task.name=countdown: reach a target with + - * / and given numbers, each used at most once."""

    operands: int = 4
    """Numbers in a puzzle."""
    max_number: int = 25
    """Largest given number."""
    max_target: int = 100
    """Largest target."""
    max_steps: int = 6
    """A solution has at most this many operations."""
    partial_credit: bool = True
    """Valid steps and reaching the target earn a part of the reward; false: 1 for a solution, else 0."""


@dataclass
class TaskConfig:
    """Where prompts come from and how they are cut."""

    name: Literal["sentiment", "demo", "countdown"] = "sentiment"
    """`sentiment`: labelled reviews, continued to turn positive. `demo`: the same, written by a grammar. `countdown`:
    arithmetic puzzles, judged by a program."""
    dataset: str = "stanfordnlp/imdb"
    """Hub dataset, `save_to_disk` folder, or folder with train.* and test.* (parquet, csv or jsonl)."""
    text_column: str = "text"
    """Column with the review, a string."""
    label_column: str = "label"
    """Column with the label: integers or strings."""
    positive_label: str = "1"
    """Value of the label column that means 'positive' (compared as text)."""
    negative_label: Optional[str] = None
    """Value that means 'negative'; null: the only other one besides -1 (unlabelled). Rows with neither are left out."""
    split_seed: int = 0
    """Seed of the one shuffle before the training file is cut into splits."""
    reward_examples: int = 5000
    """Reviews that train the reward head: the first of the shuffled training file."""
    policy_examples: int = 10000
    """Reviews whose openings are training prompts: the next ones."""
    validation_examples: int = 2000
    """Reviews held out for validation prompts and the head's accuracy: the next ones."""
    judge_examples: int = 8000
    """Reviews that train the judge of `grade compare`: the next ones, as many as are left up to this; 0: no judge."""
    prompt_sentences: int = 2
    """A prompt is at most this many opening sentences of a review."""
    prompt_max_chars: int = 200
    """A prompt is cut to this many characters, at a word's end."""
    prompt_max_tokens: int = 32
    """A prompt is cut to this many tokens."""
    countdown: CountdownConfig = field(default_factory=CountdownConfig)


# (setting, smallest allowed value, is that value itself allowed)
TASK_BOUNDS = [
    ("task.reward_examples", 2, True),
    ("task.policy_examples", 1, True),
    ("task.validation_examples", 1, True),
    ("task.judge_examples", 0, True),
    ("task.countdown.operands", 2, True),
    ("task.countdown.max_number", 2, True),
    ("task.countdown.max_target", 1, True),
    ("task.countdown.max_steps", 1, True),
    ("task.prompt_sentences", 1, True),
    ("task.prompt_max_chars", 1, True),
    ("task.prompt_max_tokens", 1, True),
]

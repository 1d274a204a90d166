"""The settings of the tasks: where prompts come from and how they are cut."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from grade.config.bounds import ROWS, SEED, TOKENS, setting

JUDGED_BY_PROGRAM = ("countdown",)
"""Tasks whose reward is a program, without a gradient."""
WRITTEN = ("demo", "countdown")
"""Tasks whose examples are written by a program when they are asked for."""
WRITTEN_EXAMPLES = 10**6
"""Most examples that it may be asked for: some minutes' work."""


@dataclass
class CountdownConfig:
    """The puzzles of task.name=countdown: reach a target with + - * / and given numbers, each used at most once."""

    operands: int = setting(4, ge=2, le=16)
    """Numbers in a puzzle."""
    max_number: int = setting(25, ge=2, le=10**6)
    """Largest given number."""
    max_target: int = setting(100, ge=1, le=10**9)
    """Largest target."""
    max_steps: int = setting(6, ge=1, le=64)
    """A solution has at most this many operations."""
    partial_credit: bool = True
    """Valid steps and reaching the target earn a part of the reward; false: 1 for a solution, else 0."""


@dataclass
class TokenizerConfig:
    """How conversations become token ids: by the chat template of the policy's tokenizer."""

    chat: bool = False
    """Prompts that are strings are a user's message too, and go through the chat template."""
    system_prompt: str | None = None
    """A system message in front of conversations that have none; null: none."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """What the chat template is given besides the messages, such as {enable_thinking: false}."""


@dataclass
class TaskConfig:
    """Where prompts come from and how they are cut."""

    name: Literal["sentiment", "demo", "countdown", "prompts"] = "sentiment"
    """`sentiment`: labelled reviews, continued to turn positive. `demo`: the same, written by a grammar. `countdown`:
    arithmetic puzzles, judged by a program. `prompts`: prompts as they are, for any reward."""
    dataset: str = "stanfordnlp/imdb"
    """Hub dataset, `save_to_disk` folder, or folder with train.* and test.* (parquet, csv or jsonl). `prompts` needs no
    test part, and takes txt (a prompt a line) and a file by itself."""
    prompt_column: str = "prompt"
    """Of `prompts`: column with strings, lists of token ids or conversations; `messages` is found too."""
    long_prompts: Literal["leave_out", "cut"] = "leave_out"
    """Of `prompts`, with more than prompt_max_tokens: left out and counted, or cut to their last tokens, which
    conversations cannot be."""
    label_type: Literal["classes", "numbers", "pairs"] | None = None
    """What a reward head learns: two classes or numbers, of each review, or which answer of a pair was chosen, with
    `prompts`. null: classes, and nothing with `prompts`."""
    chosen_column: str = "chosen"
    """Of pairs: column with the better answer, or with the prompt and the better answer."""
    rejected_column: str = "rejected"
    """Of pairs: column with the worse answer, as the better one is written."""
    text_column: str = "text"
    """Column with the review, a string."""
    label_column: str = "label"
    """Column with the label: integers or strings; numbers where label_type is numbers."""
    positive_label: str = "1"
    """Value of the label column that means 'positive' (compared as text)."""
    negative_label: str | None = None
    """Value that means 'negative'; null: the only other one besides -1 (unlabelled). Rows with neither are left out."""
    split_seed: int = setting(0, ge=0, le=SEED)
    """Seed of the one shuffle before the training file is cut into splits."""
    reward_examples: int = setting(5000, ge=2, le=ROWS)
    """Reviews or pairs that train the reward head: the first of the shuffled training file. Of `prompts` at most two
    fifths of it."""
    policy_examples: int = setting(10000, ge=1, le=ROWS)
    """Reviews whose openings are training prompts: the next ones. Of `prompts` what is left, up to this."""
    validation_examples: int = setting(2000, ge=1, le=ROWS)
    """Reviews held out for validation prompts and the head's accuracy: the next ones. Of `prompts` at most a fifth of
    the training file, or up to this many of a validation part."""
    test_examples: int = setting(2000, ge=1, le=ROWS)
    """Of `prompts` without a test part: held out for the test, at most a fifth of the training file."""
    judge_examples: int = setting(8000, ge=0, le=ROWS, role="resume")
    """Reviews that train the judge of `grade compare`: the next ones, as many as are left up to this; 0: no judge."""
    prompt_sentences: int = setting(2, ge=1, le=TOKENS)
    """A prompt is at most this many opening sentences of a review."""
    prompt_max_chars: int = setting(200, ge=1, le=10**7)
    """A prompt is cut to this many characters, at a word's end."""
    prompt_max_tokens: int = setting(32, ge=1, le=TOKENS)
    """A prompt is cut to this many tokens."""
    countdown: CountdownConfig = field(default_factory=CountdownConfig)

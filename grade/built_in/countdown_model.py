"""The model that `countdown_small` starts from: a small Llama trained on worked puzzles, and cached.

It has learnt the form of an answer and some arithmetic, and solves a part of the puzzles when it is sampled, so that
reinforcement learning has something to reward and something to gain. Its puzzles are in no split of the task.
"""

from __future__ import annotations

from pathlib import Path

from grade.built_in.small_model import cached_model, train_model, train_tokenizer
from grade.tasks import countdown

# Arithmetic is learnt as tables, so the numbers are few and small: with four operands the same training solves next to
# nothing. Targets go beyond those of countdown_small: there are more puzzles to learn from, and what has seen twice as
# many solves more of the small ones (and reinforcement can build on steps that are right).
SETTINGS = {
    "operands": 3,
    "max_number": 25,
    "max_target": 200,
    "puzzles": 7400,  # of about 7600
    "vocabulary": 800,  # at most: bytes, two special tokens, and merges until all numbers and words are one token
    "hidden_size": 128,
    "intermediate_size": 384,
    "layers": 2,
    "heads": 4,
    "context": 128,
    "steps": 3500,
    "batch_size": 32,  # puzzles per step
    "learning_rate": 3e-3,
    "warmup_steps": 50,
    "weight_decay": 0.1,
    "seed": 0,
}


def countdown_model(cache_dir: Path | None = None, *, steps: int | None = None, progress: bool = True) -> Path:
    """The folder of the Countdown model, trained now unless the cache holds it; see `cached_model`."""
    return cached_model("countdown", SETTINGS, [countdown.__file__, __file__], _train, cache_dir, steps, progress)


def _train(folder: Path, settings: dict, progress: bool) -> None:
    """Train tokenizer and model and save both in `folder`."""
    puzzles = countdown.write_puzzles(
        settings["puzzles"],
        seed=settings["seed"],
        operands=settings["operands"],
        max_number=settings["max_number"],
        max_target=settings["max_target"],
        part="pretraining",
    )
    tokenizer = train_tokenizer([puzzle.prompt + puzzle.answer for puzzle in puzzles], settings)
    prompts = tokenizer([puzzle.prompt for puzzle in puzzles])["input_ids"]  # BOS comes from the tokenizer
    answers = tokenizer([puzzle.answer for puzzle in puzzles], add_special_tokens=False)["input_ids"]
    rows = [prompt + answer + [tokenizer.eos_token_id] for prompt, answer in zip(prompts, answers, strict=True)]
    train_model(
        folder,
        tokenizer,
        rows,
        settings,
        title="Training the Countdown model, once",
        progress=progress,
        prompt_end=prompts[0][-1],
    )

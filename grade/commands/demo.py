"""`grade demo`: the whole road on built-in data. No network, no files, no GPU, a few minutes on two cores.

A grammar writes labelled reviews and a small Llama learns to write them (`grade.built_in.demo_model`); from there on it
is `grade train`: reward head, GRADE-STE, validation, best checkpoint, test.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime
from pathlib import Path

from grade import terminal
from grade.built_in.demo_model import demo_model
from grade.commands.train import train
from grade.config import Config
from grade.training.evaluation import Evaluation
from grade.training.run_folder import prepare_run_dir


def run_demo(config: Config, cache_dir: Path | None = None, pretrain_steps: int | None = None) -> dict[str, Evaluation]:
    """Train the demo's model if it is not cached, align it, print what changed.

    Args:
        config: the shipped `demo` config, with overrides; model.name is replaced by the demo's model.
        cache_dir: where the demo's model is kept; None: the user's cache directory.
        pretrain_steps: optimizer steps of the model's own training; None: its default.
    """
    if config.train.run_dir is None:
        stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
        own = f"{config.output_dir}/{config.name}-seed{config.seed}-{stamp}"
        config = replace(config, train=replace(config.train, run_dir=own))
    if not config.train.resume:
        prepare_run_dir(config)  # before the model is trained
    terminal.say("1/2 A language model that writes reviews (cached after the first time)")
    config = replace(config, model=replace(config.model, name=str(demo_model(cache_dir, steps=pretrain_steps))))
    name = config.method.name.upper()
    terminal.say(f"2/2 {name}: raise the probability that a review is positive")
    return train(config)

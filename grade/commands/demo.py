"""`grade demo`: the whole road on built-in data. No network, no files, no GPU, a few minutes on two cores.

A grammar writes labelled reviews and a small Llama learns to write them (`grade.built_in.demo_model`); from there on it
is exactly the code of a real run: reward head, GRADE-STE, validation, best checkpoint, test.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime
from pathlib import Path

from rich.console import Console

from grade import terminal
from grade.built_in.demo_model import demo_model
from grade.config import Config
from grade.errors import NothingLeft
from grade.processes import make_accelerator
from grade.training.evaluation import Evaluation
from grade.training.evaluation_tables import result_tables
from grade.training.run_folder import prepare_run_dir, started
from grade.training.trainer import Trainer


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
    terminal.say("1/3 A language model that writes reviews (cached after the first time)")
    config = replace(config, model=replace(config.model, name=str(demo_model(cache_dir, steps=pretrain_steps))))
    accelerator = make_accelerator(config)
    out, resume = Console(), config.train.resume
    try:
        with started(config, accelerator) as (config, run_dir):
            terminal.say("2/3 A reward: the probability that a review is positive")
            trainer = Trainer(config, accelerator, run_dir)
            name = config.method.name.upper()
            terminal.say(f"3/3 {name}: backpropagate the reward through sampled tokens")
            rows = trainer.fit()
    except NothingLeft as error:
        if resume != "auto":
            raise
        out.print(str(error), soft_wrap=True, highlight=False, markup=False)
        return {}
    if rows:
        for table in result_tables(rows):
            out.print(table)
    out.print(f"Run directory: {run_dir}", soft_wrap=True)
    return rows

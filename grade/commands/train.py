"""`grade train`: hold a run's folder, train, and print what came out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from accelerate import Accelerator
from rich.console import Console

from grade.config import Config
from grade.errors import NothingLeft
from grade.processes import main_process_first, make_accelerator, shared
from grade.training.evaluation import Evaluation
from grade.training.evaluation_tables import result_tables
from grade.training.run_folder import run_folder
from grade.training.trainer import Trainer


@contextmanager
def started(config: Config, accelerator: Accelerator) -> Iterator[tuple[Config, Path]]:
    """Hold the run's folder, in the main process for all; yields the config as it is decided and the folder.

    Raises:
        GradeError: in every process, if the folder cannot be used.
    """
    with ExitStack() as stack:
        with main_process_first(accelerator):
            if accelerator.is_main_process:
                config = stack.enter_context(run_folder(config))
        decided = shared(accelerator, (config.train.resume, config.train.overwrite))
        train = replace(config.train, resume=decided[0], overwrite=decided[1])
        yield replace(config, train=train), Path(config.run_dir)


def train(config: Config) -> dict[str, Evaluation]:
    """`grade train`: run a config and print what came out."""
    accelerator, resume = make_accelerator(config), config.train.resume
    try:
        with started(config, accelerator) as (config, run_dir):
            trainer = Trainer(config, accelerator, run_dir)
            rows = trainer.fit()
    except NothingLeft as error:
        if resume != "auto":
            raise
        if accelerator.is_main_process:
            Console().print(str(error), soft_wrap=True, highlight=False, markup=False)
        return {}
    if accelerator.is_main_process:
        console = Console()
        if rows:
            for table in result_tables(rows):
                console.print(table)
        if (verdict := trainer.validations.verdict()) is not None:
            console.print(verdict, soft_wrap=True)
        console.print(f"Run directory: {run_dir}", soft_wrap=True)
    return rows

"""`grade train`: train what the settings name, and print what came out."""

from __future__ import annotations

from rich.console import Console

from grade.config import Config
from grade.errors import NothingLeft
from grade.training.api import GradeTrainer
from grade.training.evaluation import Evaluation
from grade.training.evaluation_tables import result_tables


def train(config: Config) -> dict[str, Evaluation]:
    """`grade train`: run a config and print what came out; the evaluations of the test, if there was one."""
    trainer, resume = GradeTrainer.from_config(config), config.train.resume
    main = trainer.accelerator.is_main_process
    try:
        result = trainer.train()
    except NothingLeft as error:
        if resume != "auto":
            raise
        if main:
            Console().print(str(error), soft_wrap=True, highlight=False, markup=False)
        return {}
    rows = {"base": result.base, "best": result.best} if result.best.split == "test" else {}
    if main:
        console = Console()
        if rows:
            for table in result_tables(rows):
                console.print(table)
        if result.warning is not None:
            console.print(result.warning, soft_wrap=True)
        console.print(f"Run directory: {result.run_dir}", soft_wrap=True)
    return rows

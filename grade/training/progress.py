"""The progress bar of a run: reward, KL, hops and tokens per second, refreshed every step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class TrainingProgress:
    """A bar for the steps and, while an evaluation runs, one for its prompts."""

    def __init__(self, bar: Progress, steps: int, done: int):
        self.bar = bar
        self.task = bar.add_task("training", total=steps, completed=done, note="")

    def advance(self, metrics: dict[str, float]) -> None:
        note = (
            f"reward {metrics['reward']:.3f}  KL {metrics['kl']:.3f}  "
            + (f"hops {metrics['hops']:.1f}  " if "hops" in metrics else "")
            + f"{metrics['tokens_per_second']:.0f} tokens/s"
        )
        self.bar.update(self.task, advance=1, note=note)

    def say(self, line: str) -> None:
        """A line that stays, above the bars."""
        self.bar.console.print(line, highlight=False, markup=False)  # a label or a token may look like a tag

    @contextmanager
    def evaluation(self, split: str, prompts: int) -> Iterator[Callable[[int], None]]:
        """A second bar; yields a function to call with the number of prompts done."""
        task = self.bar.add_task(split, total=prompts, note="")
        try:
            yield lambda count: self.bar.update(task, advance=count)
        finally:
            self.bar.remove_task(task)


@contextmanager
def training_progress(steps: int, done: int, *, enabled: bool) -> Iterator[TrainingProgress]:
    """Show a bar on standard error while the block runs; silent on processes other than the main one."""
    columns = (
        TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn(), TimeElapsedColumn(),
        TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True, quiet=not enabled), disable=not enabled) as bar:
        yield TrainingProgress(bar, steps, done)


@contextmanager
def counting(title: str, total: int) -> Iterator[Callable[[], None]]:
    """Show a bar on standard error while the block runs; yields a function to call after each of `total` parts."""
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=total)
        yield lambda: bar.update(task, advance=1)

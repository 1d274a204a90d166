"""The progress of a run: reward, KL, hops and tokens per second, every step on a terminal and now and then in a log."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from grade.terminal import Counter, Tick, counter


class TrainingProgress:
    """Shows the steps and, while an evaluation runs, its prompts."""

    def __init__(self, shown: Counter, tick: Tick):
        self.shown, self.tick = shown, tick
        self.say, self.warn = shown.say, shown.warn

    def advance(self, metrics: dict[str, float]) -> None:
        self.tick(
            note=(
                f"reward {metrics['reward']:.3f}  KL {metrics['kl']:.3f}  "
                + (f"hops {metrics['hops']:.1f}  " if "hops" in metrics else "")
                + f"{metrics['tokens_per_second']:.0f} tokens/s"
            )
        )

    def go_back(self, steps: int) -> None:
        """So many steps are made again."""
        self.tick(count=-steps)

    @contextmanager
    def evaluation(self, split: str, prompts: int) -> Iterator[Callable[[int], None]]:
        """Yields a function to call with the number of prompts done."""
        with self.shown.counting(split, prompts, keep=False) as tick:
            yield tick


@contextmanager
def training_progress(steps: int, done: int, *, every: int = 1, enabled: bool) -> Iterator[TrainingProgress]:
    """Show progress on standard error while the block runs; silent on processes other than the main one.

    Args:
        every: steps between two lines, where there is no terminal for a bar.
    """
    with counter(enabled=enabled) as shown, shown.counting("training", steps, done, every=every) as tick:
        yield TrainingProgress(shown, tick)

"""A worker of the training step: steps of one algorithm in one setting, each kept when it has been measured."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from benchmarks.gpu.work import Work, ordered

if TYPE_CHECKING:
    from benchmarks.training_setup import Setting

RATES = "what the device reads and multiplies"


@dataclass(frozen=True)
class Entry:
    """Steps to measure.

    Args:
        batch, prompt, length, k: as `benchmarks.training_setup.Setting` takes them.
        share: of the time that is left when it begins, which compilation takes most of.
        goal: seconds that a step should take at most.
    """

    shape: str
    dtype: Literal["float32", "bfloat16"]
    device: Literal["cpu", "cuda"]
    batch: int
    prompt: int
    length: int
    k: int
    algorithm: str
    repeats: int
    share: float
    goal: float | None = None

    @property
    def name(self) -> str:
        return f"{self.shape} {self.dtype} B={self.batch} P={self.prompt} S={self.length} k={self.k} {self.algorithm}"

    @property
    def keys(self) -> list[str]:
        return [f"{self.name}, step {number}" for number in range(1, self.repeats + 1)]

    def setting(self, layers: int | None = None) -> Setting:
        """What a step of it is given.

        Args:
            layers: decoder layers; None: all.
        """
        from benchmarks.training_setup import Setting  # only what is measured needs torch and transformers

        sizes = {"batch": self.batch, "prompt": self.prompt, "length": self.length, "k": self.k}
        return Setting(self.shape, **sizes, dtype=self.dtype, device=self.device, layers=layers)


def _qwen3_4b(batch: int, length: int, algorithm: str, repeats: int, share: float, goal: float | None = None) -> Entry:
    return Entry("qwen3-4b", "bfloat16", "cuda", batch, 32, length, 256, algorithm, repeats, share, goal)


ENTRIES = (
    _qwen3_4b(16, 64, "replay", 5, 0.4, goal=1.0),
    _qwen3_4b(16, 64, "compiled", 5, 0.5, goal=1.0),
    _qwen3_4b(16, 64, "layers", 5, 0.8, goal=1.0),
    _qwen3_4b(8, 512, "checkpointed", 3, 0.5),
    _qwen3_4b(8, 2048, "checkpointed", 2, 0.6),
)
"""Random weights in the shape of Qwen3-4B; in the order of their worth."""
DRY = (
    Entry("llama-260k", "float32", "cpu", 1, 2, 3, 4, "replay", 3, 0.5, goal=1.0),
    Entry("llama-260k", "float32", "cpu", 1, 2, 3, 4, "layers", 1, 0.5, goal=1.0),
)


def entries(dry: bool) -> tuple[Entry, ...]:
    return DRY if dry else ENTRIES


def command(dry: bool, number: int) -> list[str]:
    """Of the worker that measures the entry of this number."""
    return [sys.executable, "-m", "benchmarks.gpu.training", *(["--dry"] if dry else []), str(number)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("number", type=int)
    options = parser.parse_args()
    work(entries(options.dry)[options.number], Work(ordered()))


def work(entry: Entry, work: Work) -> None:
    """Measure what is missing of the entry's steps."""
    # Only what is measured needs torch and transformers.
    from benchmarks.training_floors import floors, rates
    from benchmarks.training_setup import measure
    from grade.machine import is_out_of_memory

    setting = entry.setting()
    if work.begin(RATES):
        work.done(RATES, {"status": "ok", **rates(setting.device, setting.dtype, quick=work.order.dry)})
    device = work.rows.kept(RATES)
    left = [key for key in entry.keys if work.rows.kept(key) is None]
    if not left or not work.enter(left[0]):
        return

    def keep(step: dict) -> None:
        bounds = {}
        if device is not None and step["hops"] is not None:
            bounds = {"floors": floors(setting, entry.length, step["hops"], device)}
        work.done(left.pop(0), {"status": "ok", "entry": entry.name, "goal": entry.goal, **step, **bounds})
        if left:
            work.enter(left[0])

    try:
        measure(setting, entry.algorithm, repeats=len(left), seconds=float("inf"), counted=0.0, keep=keep)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        for key in list(left):
            work.done(key, {"status": "out of memory"})


if __name__ == "__main__":
    main()

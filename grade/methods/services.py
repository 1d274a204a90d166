"""What the trainer lends a method: sums over processes, agreement between them, the step's clock."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Totals(NamedTuple):
    """Of a step or a mini-batch, over all its micro-batches and processes."""

    tokens: int
    responses: int


@dataclass
class Services:
    """The defaults serve a single process without a clock.

    Args:
        reduce: float64 tensor -> its sum over processes, on CPU; identical shapes everywhere.
        phase: given a phase's name, a context that times it.
        failing_together: a context behind which a reward that has failed inside it in one process has failed in all
            (`grade.processes.failing_together`).
        before_update: told, before an update, the sums (`grade.methods.metrics.step_sums`) of the step so far on this
            process: where they are not finite, the trainer does not make the update that follows.
    """

    reduce: Callable[[Tensor], Tensor] = lambda values: values
    phase: Callable[[str], AbstractContextManager] = lambda name: nullcontext()
    failing_together: Callable[[], AbstractContextManager] = nullcontext
    before_update: Callable[[dict[str, float]], None] = lambda sums: None

    def any_process(self, wanted: bool) -> bool:
        """Whether any process wants it."""
        return bool(self.reduce(torch.tensor(float(wanted), dtype=torch.float64)) > 0)

    def sum(self, values: dict[str, float]) -> dict[str, float]:
        """Sums over processes; every process has the same names in the same order."""
        if not values:
            return {}
        total = self.reduce(torch.tensor(list(values.values()), dtype=torch.float64))
        return dict(zip(values, total.tolist(), strict=True))

    def totals(self, masks: Iterable[Tensor]) -> Totals:
        """Tokens, and responses that have any, of masks [B, S] bool."""
        own = {"tokens": 0.0, "responses": 0.0}
        for mask in masks:
            own["tokens"] += int(mask.sum())
            own["responses"] += int(mask.any(1).sum())
        total = self.sum(own)
        return Totals(int(total["tokens"]), int(total["responses"]))

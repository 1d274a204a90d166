"""What the trainer lends a method: sums over processes, agreement between them, the step's clock."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Callable, ContextManager, Dict, List, NamedTuple

import torch

from grade.rollout import Rollout


class Totals(NamedTuple):
    """Of a step, over all its rollouts and processes."""

    tokens: int
    responses: int


@dataclass
class Services:
    """The defaults serve a single process without a clock.

    Args:
        reduce: float64 tensor -> its sum over processes, on CPU; identical shapes everywhere.
        phase: given a phase's name, a context that times it.
    """

    reduce: Callable[[torch.Tensor], torch.Tensor] = lambda values: values
    phase: Callable[[str], ContextManager] = lambda name: nullcontext()

    def any_process(self, wanted: bool) -> bool:
        """Whether any process wants it."""
        return bool(self.reduce(torch.tensor(float(wanted), dtype=torch.float64)) > 0)

    def sum(self, values: Dict[str, float]) -> Dict[str, float]:
        """Sums over processes; every process has the same names in the same order."""
        if not values:
            return {}
        total = self.reduce(torch.tensor(list(values.values()), dtype=torch.float64))
        return dict(zip(values, total.tolist(), strict=True))

    def totals(self, rollouts: List[Rollout]) -> Totals:
        own = {"tokens": sum(int(r.mask.sum()) for r in rollouts), "responses": sum(len(r) for r in rollouts)}
        total = self.sum({name: float(value) for name, value in own.items()})
        return Totals(int(total["tokens"]), int(total["responses"]))

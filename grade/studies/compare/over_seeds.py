"""Means over seeds as comparison.json has them; needs no model, as the report reads some of them anew."""

from __future__ import annotations

import statistics
from collections.abc import Iterable


def over_seeds(values: Iterable[float | None]) -> dict | None:
    """The "mean", "stderr" and their number "n" of the values that are there, "stderr" None of one; None of none."""
    known = [v for v in values if v is not None]
    if not known:
        return None
    stderr = statistics.stdev(known) / len(known) ** 0.5 if len(known) > 1 else None
    return {"mean": statistics.fmean(known), "stderr": stderr, "n": len(known)}

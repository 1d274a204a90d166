"""The sweep of a comparison: every method with the same few learning rates; its best by validation is its own."""

from __future__ import annotations

import math
from collections.abc import Mapping

from rich.console import Console

from grade.errors import GradeError
from grade.studies.compare.comparison import best_within
from grade.studies.compare.jobs import check_jobs, curve_of, run_jobs
from grade.studies.compare.plan import Comparison, check_steps

_EXTENSIONS = 2  # of the sweep, beyond the factors


def swept_rates(
    comparison: Comparison, inputs: Mapping[str, str], console: Console, lock: int
) -> tuple[dict[str, float], list[dict], dict[str, str]]:
    """(learning rate by method, what was tried, failures). A rate that fails is not chosen.

    Factors are tried one after another, each with every method. Where a method's best is the lowest or the highest
    it has tried, a better one may lie beyond: that is tried too, `_EXTENSIONS` times at most.
    """
    config, compare = comparison.config, comparison.config.compare
    factors = sorted(set(compare.learning_rate_factors))
    if compare.sweep_steps == 0 or len(factors) == 1:
        rate = config.train.learning_rate * (factors[0] if compare.sweep_steps else 1.0)
        return {method: rate for method in comparison.methods}, [], {}
    objectives: dict[str, dict[float, float | None]] = {method: {} for method in comparison.methods}
    failures: dict[str, str] = {}
    wanted = [(method, factor) for factor in factors for method in comparison.methods]
    for _ in range(1 + _EXTENSIONS):
        jobs = {key: comparison.sweep_job(*key) for key in wanted}
        check_jobs(list(jobs.values()), inputs)
        check_steps(jobs.values(), "compare.sweep_steps")
        steps = f"{compare.sweep_steps} step{'s' * (compare.sweep_steps > 1)}"
        console.print(f"Learning rates: {len(jobs)} run{'s' * (len(jobs) > 1)} of {steps}", highlight=False)
        failures |= run_jobs(list(jobs.values()), compare.jobs, console, lock=lock)
        for (method, factor), job in jobs.items():
            found = math.nan
            if job.name not in failures:
                try:
                    found = best_within(curve_of(job, method, compare.sweep_seed)).objective
                except GradeError as error:
                    failures[job.name] = str(error)
            objectives[method][factor] = found if math.isfinite(found) else None
        further = {method: _beyond(tried) for method, tried in objectives.items()}
        wanted = [(method, factor) for method, factor in further.items() if factor is not None]
        if not wanted:
            break
    rates = {
        method: config.train.learning_rate * best
        for method, tried in objectives.items()
        if (best := _best(tried)) is not None
    }
    sweep = [
        {"method": method, "learning_rate": config.train.learning_rate * factor, "objective": tried[factor]}
        for method, tried in objectives.items()
        for factor in sorted(tried)
    ]
    return rates, sweep, {f"sweep/{name}": reason for name, reason in failures.items()}


def _best(objectives: Mapping[float, float | None]) -> float | None:
    """The factor with the highest objective, the lowest of equals; None if all failed."""
    known = {factor: found for factor, found in sorted(objectives.items()) if found is not None}
    return max(known, key=known.__getitem__, default=None)


def _beyond(objectives: Mapping[float, float | None]) -> float | None:
    """The factor to try next, where the best is the first or the last: at the ratio to it that it has to its
    neighbour. None where the best lies inside, or all failed."""
    factors, best = sorted(objectives), _best(objectives)
    if best not in (factors[0], factors[-1]):
        return None
    return best * best / factors[1 if best == factors[0] else -2]

"""The sweep of a comparison: every method with the same few learning rates, then, with its best by validation, with the
same few schedules."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from rich.console import Console

from grade.config.training import Schedule
from grade.errors import GradeError
from grade.studies.compare.comparison import best_within
from grade.studies.compare.jobs import check_jobs, curve_of, run_jobs
from grade.studies.compare.plan import Comparison, check_steps

_EXTENSIONS = 2  # of the sweep, beyond the factors


@dataclass
class Swept:
    """What the sweep found.

    Attributes:
        rates, schedules: by method; one all of whose trials failed has neither.
        tried: rows for comparison.json: "method", "learning_rate", "schedule" and "objective", which is None of a trial
            that failed.
        failures: by name, why.
    """

    rates: dict[str, float]
    schedules: dict[str, Schedule]
    tried: list[dict] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)


class Sweep:
    """Trials of a comparison.

    Args:
        inputs: fingerprint of what the runs read.
        lock: of the comparison's folder, which its processes keep.
    """

    def __init__(self, comparison: Comparison, inputs: Mapping[str, str], console: Console, lock: int):
        self.comparison, self.inputs, self.console, self.lock = comparison, inputs, console, lock
        self.failures: dict[str, str] = {}

    def settings(self) -> Swept:
        """The learning rate of every method, and the schedule. A trial that fails is not chosen.

        Factors are tried one after another, each with every method. Where a method's best is the lowest or the highest
        it has tried, a better one may lie beyond: that is tried too, `_EXTENSIONS` times at most. Schedules are tried
        with the rate that this has found.
        """
        config, compare = self.comparison.config, self.comparison.config.compare
        factors, own = sorted(set(compare.learning_rate_factors)), config.train.schedule
        schedules = list(dict.fromkeys(compare.schedules or [own]))
        if compare.sweep_steps == 0 or len(factors) == len(schedules) == 1:
            rate = config.train.learning_rate * (factors[0] if compare.sweep_steps else 1.0)
            methods = self.comparison.methods
            return Swept(dict.fromkeys(methods, rate), dict.fromkeys(methods, schedules[0]))
        first = own if own in schedules else schedules[0]
        objectives = self._rates(factors, first)
        best = {method: found for method, tried in objectives.items() if (found := _best(tried)) is not None}
        by_schedule = {method: {first: objectives[method][factor]} for method, factor in best.items()}
        further = [(method, factor, s) for s in schedules if s != first for method, factor in best.items()]
        if further:
            for (method, _, schedule), found in self._objectives(further, "Schedules").items():
                by_schedule[method][schedule] = found
        rate = config.train.learning_rate
        tried = [
            {"method": method, "learning_rate": rate * factor, "schedule": first, "objective": found}
            for method, of_method in objectives.items()
            for factor, found in sorted(of_method.items())
        ]
        tried += [
            {"method": method, "learning_rate": rate * best[method], "schedule": schedule, "objective": found}
            for method, of_method in by_schedule.items()
            for schedule, found in of_method.items()
            if schedule != first
        ]
        chosen = {method: _highest(schedules, of_method) for method, of_method in by_schedule.items()}
        failures = {f"sweep/{name}": reason for name, reason in self.failures.items()}
        return Swept({method: rate * factor for method, factor in best.items()}, chosen, tried, failures)

    def _rates(self, factors: list[float], schedule: Schedule) -> dict[str, dict[float, float | None]]:
        """Objectives by method and factor, the extensions included."""
        objectives: dict[str, dict[float, float | None]] = {method: {} for method in self.comparison.methods}
        wanted = [(method, factor) for factor in factors for method in self.comparison.methods]
        for _ in range(1 + _EXTENSIONS):
            trials = [(method, factor, schedule) for method, factor in wanted]
            for (method, factor, _), found in self._objectives(trials, "Learning rates").items():
                objectives[method][factor] = found
            further = {method: _beyond(tried) for method, tried in objectives.items()}
            wanted = [(method, factor) for method, factor in further.items() if factor is not None]
            if not wanted:
                break
        return objectives

    def _objectives(
        self, trials: Iterable[tuple[str, float, Schedule]], what: str
    ) -> dict[tuple[str, float, Schedule], float | None]:
        """The best objective of each trial (method, factor, schedule); None of one that failed."""
        compare = self.comparison.config.compare
        jobs = {trial: self.comparison.sweep_job(*trial) for trial in trials}
        check_jobs(list(jobs.values()), self.inputs)
        check_steps(jobs.values(), "compare.sweep_steps")
        steps = f"{compare.sweep_steps} step{'s' * (compare.sweep_steps > 1)}"
        self.console.print(f"{what}: {len(jobs)} run{'s' * (len(jobs) > 1)} of {steps}", highlight=False)
        self.failures |= run_jobs(list(jobs.values()), compare.jobs, self.console, lock=self.lock)
        objectives: dict[tuple[str, float, Schedule], float | None] = {}
        for trial, job in jobs.items():
            found = math.nan
            if job.name not in self.failures:
                try:
                    found = best_within(curve_of(job, trial[0], compare.sweep_seed)).objective
                except GradeError as error:
                    self.failures[job.name] = str(error)
            objectives[trial] = found if math.isfinite(found) else None
        return objectives


def _highest(schedules: Sequence[Schedule], objectives: Mapping[Schedule, float | None]) -> Schedule:
    """The schedule with the highest objective, the first of equals; one that failed comes last."""
    return max(schedules, key=lambda s: -math.inf if (found := objectives[s]) is None else found)


def _best(objectives: Mapping[float, float | None]) -> float | None:
    """The factor with the highest objective, the lowest of equals; None if all failed."""
    known = {factor: found for factor, found in sorted(objectives.items()) if found is not None}
    return max(known, key=known.__getitem__, default=None)


def _beyond(objectives: Mapping[float, float | None]) -> float | None:
    """The factor to try next, where the best is the first or the last: at the ratio to it that it has to its
    neighbour. None where the best lies inside, there is but one, or all failed."""
    factors, best = sorted(objectives), _best(objectives)
    if len(factors) == 1 or best not in (factors[0], factors[-1]):
        return None
    return best * best / factors[1 if best == factors[0] else -2]

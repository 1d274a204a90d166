"""Compare methods over seeds at equal cost: from the files of runs and their test results to the numbers of tables.

Two costs are equalised, each by itself: tokens generated in training, and seconds of training. A method's checkpoint
is its best by validation within the budget; the numbers on test prompts are those of that checkpoint. Every mean is
over seeds, ± its standard error.

Best is what has the highest objective, metric - kl_coef * KL: all methods are asked to maximise it, so all are chosen
by it, learning rates and checkpoints alike. By the metric alone, a method would win that buys it with a KL that the
objective does not pay for. Where method.target_kl moves kl_coef, it is the one that this starts from.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, Literal

from grade.config.yaml_files import plain_yaml
from grade.errors import GradeError, reason_of
from grade.formats import LOGGED
from grade.jsonl import read_rows
from grade.shapes import misfit
from grade.studies.compare.over_seeds import over_seeds
from grade.training.evaluation import write_evaluations
from grade.training.run_folder import make_again

BudgetKind = Literal["tokens", "seconds"]
Checkpoint = tuple[str, int | None, int]
"""(method, seed, step)."""
BASE: Checkpoint = ("base", None, 0)
Tests = Mapping[Checkpoint, Mapping[str, float | None]]
TESTED = (
    *("reward", "solve_rate", "kl", "entropy", "judge", "nats_per_byte", "perplexity"),
    *("repetition", "length_distance", "entropy_distance"),
)
"""Measures of a test that tables show; what they are is in `grade.studies.compare.measures`."""
SLACK = 0.02
"""Relative excess over a budget that still counts as within it."""
THRESHOLD = 0.8
"""Share of the best improvement in validation that a run is timed to."""


@dataclass(frozen=True)
class Validation:
    """One validation of a run.

    Attributes:
        step: optimizer steps taken before it.
        tokens, seconds: generated and spent in training before it.
        metric: solve rate if the task has one, else reward.
        objective: metric - kl_coef * KL, as `objective` has it.
        kl, entropy: nats per token.
    """

    step: int
    tokens: int
    seconds: float
    metric: float
    objective: float
    kl: float
    entropy: float


@dataclass(frozen=True)
class RunCurve:
    """One run, step by step. Entry i of a list belongs to training step i; `tokens` and `seconds` are sums so far.

    Attributes:
        metric: what `Validation.metric` is: "solve_rate" or "reward".
        kl_coef, kl_reduction: of its config.
        reward, kl, entropy: of the step (KL and entropy in nats per token); None where they were not finite.
        grad_norm: of the step; None where it made no update.
        validations: in order, the base model's (step 0) first.
        peak_gib: largest memory; None before the first step.
        complete: all steps of its config are trained and validated.
    """

    method: str
    seed: int
    metric: str
    kl_coef: float
    kl_reduction: str
    tokens: list[int]
    seconds: list[float]
    reward: list[float | None]
    kl: list[float | None]
    entropy: list[float | None]
    grad_norm: list[float | None]
    validations: list[Validation]
    peak_gib: float | None
    complete: bool


@dataclass(frozen=True)
class Budgets:
    """Training costs that every run has had: generated tokens, and seconds."""

    tokens: int
    seconds: float


# -- reading -------------------------------------------------------------------------------------------------


def read_run(run_dir: Path, method: str, seed: int) -> RunCurve:
    """The curve of a run, finished or still going on.

    Raises:
        GradeError: there is not even a validation of the base model, a line or step is missing in the middle, or
            there is no config.yaml; or they are damaged.
    """
    try:
        return _read_run(run_dir, method, seed)
    except (OSError, LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        reason = f"{type(error).__name__}: {reason_of(error)}"
        raise GradeError(f"{run_dir} holds damaged files ({reason}). {make_again(run_dir)}") from error


def _read_run(run_dir: Path, method: str, seed: int) -> RunCurve:
    rows = _rows(run_dir)
    validated = [row for row in rows if "validation/reward" in row]
    steps = [row for row in rows if "validation/reward" not in row]
    if not validated or validated[0]["step"] != 0:
        raise GradeError(f"{run_dir} holds no validation of the base model. {make_again(run_dir)}")
    if [row["step"] for row in steps] != list(range(len(steps))) or validated[-1]["step"] > len(steps):
        raise GradeError(f"{run_dir}/metrics.jsonl lacks steps. {make_again(run_dir)}")
    tokens = list(accumulate(int(row["tokens"]) for row in steps))
    seconds = list(accumulate(sum(v for k, v in row.items() if k.startswith("seconds/")) for row in steps))
    metric = "solve_rate" if "validation/solve_rate" in validated[0] else "reward"
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise GradeError(f"{run_dir} holds no config.yaml. {make_again(run_dir)}")
    config = plain_yaml(path)
    kl_coef, kl_reduction = config["method"]["kl_coef"], config["method"]["kl_reduction"]
    return RunCurve(
        method=method,
        seed=seed,
        metric=metric,
        kl_coef=kl_coef,
        kl_reduction=kl_reduction,
        tokens=tokens,
        seconds=seconds,
        reward=[row["reward"] for row in steps],
        kl=[row["kl"] for row in steps],
        entropy=[row["entropy"] for row in steps],
        grad_norm=[row["grad_norm"] if row.get("updates", 1) else None for row in steps],
        validations=[
            Validation(
                step=row["step"],
                tokens=([0] + tokens)[row["step"]],
                seconds=([0.0] + seconds)[row["step"]],
                metric=row[f"validation/{metric}"],
                kl=row["validation/kl"],
                entropy=row["validation/entropy"],
                objective=objective(
                    row[f"validation/{metric}"],
                    row["validation/kl"],
                    row["validation/kl_sequence"],
                    kl_coef,
                    kl_reduction,
                ),
            )
            for row in validated
        ],
        peak_gib=max((row["memory/peak_gib"] for row in steps), default=None),
        complete=len(steps) == config["train"]["steps"] == validated[-1]["step"],
    )


def objective(metric: float, kl: float, kl_sequence: float, kl_coef: float, kl_reduction: str) -> float:
    """metric - kl_coef * KL, with KL as the run's loss has it: nats per token (`kl`), or per response with
    kl_reduction sequence_sum (`kl_sequence`)."""
    return metric - kl_coef * (kl_sequence if kl_reduction == "sequence_sum" else kl)


def _rows(run_dir: Path) -> list[dict]:
    """The rows of a run's log; a last line that is still being written, or was cut short, is left out."""
    path = run_dir / "metrics.jsonl"
    found = read_rows(path)
    if found.broken:
        raise GradeError(f"{path}: line {found.broken[0]} is broken. {make_again(run_dir)}")
    wrong = next((wrong for row in found.rows if (wrong := misfit(row, LOGGED)) is not None), None)
    if wrong is not None:
        raise GradeError(f"{path} is damaged: {wrong}. {make_again(run_dir)}")
    return found.rows


# -- equal cost ----------------------------------------------------------------------------------------------


def common_budgets(curves: Sequence[RunCurve]) -> Budgets:
    """The largest budgets that every run has had: the smallest total of tokens, and of seconds, over the runs.

    So no run has to train longer, whatever it was stopped by; longer runs are judged by their earlier checkpoints.
    One run that has hardly begun makes the budgets hardly anything: leave it out, or wait for it.
    """
    return Budgets(
        tokens=min(curve.tokens[-1] if curve.tokens else 0 for curve in curves),
        seconds=min(curve.seconds[-1] if curve.seconds else 0.0 for curve in curves),
    )


def best_within(curve: RunCurve, *, tokens: float | None = None, seconds: float | None = None) -> Validation:
    """The validation with the highest objective (the earliest of equals) within the budget.

    A cost may exceed the budget by `SLACK`: responses differ in length, so runs of equally many steps differ a little
    in tokens, and the smallest total would cut off the last validation of all the others. The base model (step 0) is
    what a run starts from, not what it found: it is within every budget, and counts only where nothing else is.
    """
    within = _within(curve, tokens=tokens, seconds=seconds)
    trained = [v for v in within if v.step > 0]
    return max(trained or within, key=lambda v: v.objective)


def _within(curve: RunCurve, *, tokens: float | None = None, seconds: float | None = None) -> list[Validation]:
    limits = [math.inf if limit is None else limit * (1 + SLACK) for limit in (tokens, seconds)]
    return [v for v in curve.validations if v.tokens <= limits[0] and v.seconds <= limits[1]]


# -- the table -----------------------------------------------------------------------------------------------


def table(curves: Sequence[RunCurve], tests: Tests, *, budget: BudgetKind) -> list[dict]:
    """One row for the base model, then one per method, in the order of `curves`.

    Args:
        curves: all runs; `common_budgets` of them is the budget.
        tests: (method, seed, step of `best_within`) -> its results on test prompts, and `BASE` -> the base
            model's, which also stands for a seed that had nothing trained within the budget: `TESTED` and
            "kl_sequence". All may be missing.
        budget: which cost is equal.

    Returns:
        Rows ready for JSON: "method", "seeds", "untrained" (seeds with nothing trained within the budget, whose
        numbers are the base model's), "unfinished" (runs), "metric" ("reward" or "solve_rate": what "best"
        and "gap" are in), "best_steps", "threshold" (the base's metric plus `THRESHOLD` of the best run's
        improvement; None if no run improved), "reached" (seeds that had a validation of at least that within the
        budget), and numbers: None, or {"mean", "stderr", "n"} over seeds, "stderr" None where n is 1.
        "test/<key>": of the chosen checkpoint, "test/objective" being metric - kl_coef * KL. "best": its validation.
        "gap": "best" minus test. "used_tokens", "used_seconds": what it had cost.
        "steps_to", "tokens_to", "seconds_to": cost of the first validation at the threshold, None unless every seed
        reached it. "grad_norm/median", "grad_norm/p90", "grad_norm/max": over a run's steps. "step_seconds": a run's
        median. "peak_gib".
    """
    limit: dict[str, float] = {budget: getattr(common_budgets(curves), budget)}
    base = curves[0].validations[0].metric  # fixed prompts and noise: the base model is the same in every run
    peak = max(best_within(curve, **limit).metric for curve in curves)
    threshold = base + THRESHOLD * (peak - base) if peak > base else None
    rows = [
        {
            "method": "base",
            "seeds": [],
            "untrained": [],
            "unfinished": 0,
            "metric": curves[0].metric,
            "best_steps": [],
            "threshold": threshold,
            "reached": None,
            "best": over_seeds([base]),
            **_test_numbers(curves[:1], [base], [tests.get(BASE, {})]),
        }
    ]
    for method in dict.fromkeys(curve.method for curve in curves):
        rows.append(_method_row([c for c in curves if c.method == method], tests, limit, threshold))
    return rows


def _method_row(runs: list[RunCurve], tests: Tests, limit: dict[str, float], threshold: float | None) -> dict:
    best = [best_within(run, **limit) for run in runs]
    reached = [v for v in (_first_reaching(run, threshold, limit) for run in runs) if v is not None]
    keys = [(run.method, run.seed, v.step) if v.step > 0 else BASE for run, v in zip(runs, best, strict=True)]
    numbers = _test_numbers(runs, [v.metric for v in best], [tests.get(key, {}) for key in keys])
    all_reached, trained = len(reached) == len(runs), [run for run in runs if run.tokens]
    norms = [sorted(known) for run in runs if (known := [norm for norm in run.grad_norm if norm is not None])]
    return {
        "method": runs[0].method,
        "seeds": [run.seed for run in runs],
        "untrained": [run.seed for run, v in zip(runs, best, strict=True) if v.step == 0],
        "unfinished": sum(not run.complete for run in runs),
        "metric": runs[0].metric,
        "best_steps": [v.step for v in best],
        "threshold": threshold,
        "reached": len(reached),
        "best": over_seeds(v.metric for v in best),
        **numbers,
        "used_tokens": over_seeds(v.tokens for v in best),
        "used_seconds": over_seeds(v.seconds for v in best),
        "steps_to": over_seeds(v.step for v in reached) if all_reached else None,
        "tokens_to": over_seeds(v.tokens for v in reached) if all_reached else None,
        "seconds_to": over_seeds(v.seconds for v in reached) if all_reached else None,
        "grad_norm/median": over_seeds(statistics.median(ordered) for ordered in norms),
        "grad_norm/p90": over_seeds(ordered[len(ordered) * 9 // 10] for ordered in norms),
        "grad_norm/max": over_seeds(ordered[-1] for ordered in norms),
        "step_seconds": over_seeds(
            statistics.median(b - a for a, b in pairwise([0.0, *run.seconds])) for run in trained
        ),
        "peak_gib": over_seeds(run.peak_gib for run in trained),
    }


def _first_reaching(run: RunCurve, threshold: float | None, limit: dict[str, float]) -> Validation | None:
    if threshold is None:
        return None
    return next((v for v in _within(run, **limit) if v.metric >= threshold), None)


def _test_numbers(
    runs: Sequence[RunCurve], best: Sequence[float], found: Sequence[Mapping[str, float | None]]
) -> dict[str, object]:
    """Means of test results, and of validation minus test, from a validation metric and a test result per run."""
    found = [{**test, "objective": _test_objective(run, test)} for run, test in zip(runs, found, strict=True)]
    metric = runs[0].metric
    return {
        **{f"test/{name}": over_seeds(test.get(name) for test in found) for name in ("objective", *TESTED)},
        "gap": over_seeds(
            v - tested for v, test in zip(best, found, strict=True) if (tested := test.get(metric)) is not None
        ),
    }


def _test_objective(run: RunCurve, test: Mapping[str, float | None]) -> float | None:
    metric, kl, kl_sequence = (test.get(name) for name in (run.metric, "kl", "kl_sequence"))
    if metric is None or kl is None or kl_sequence is None:
        return None
    return objective(metric, kl, kl_sequence, run.kl_coef, run.kl_reduction)


# -- writing -------------------------------------------------------------------------------------------------


def write_comparison(path: Path, payload: object) -> None:
    """Write JSON, replaced as a whole; numbers that JSON does not have (NaN, infinities) become null."""
    write_evaluations(path, _finite(payload))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

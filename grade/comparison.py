"""Compare methods over seeds at equal cost: from the files of runs and their test results to tables.

Two costs are equalised, each by itself: tokens generated in training, and seconds of training. A method's checkpoint
is its best by validation within the budget; the numbers on test prompts are those of that checkpoint. Every mean is
over seeds, ± its standard error.
"""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Dict, Iterable, List, Literal, Mapping, Optional, Sequence, Tuple

import yaml
from rich.table import Table

from grade.errors import GradeError
from grade.evaluate import write_evaluations

BudgetKind = Literal["tokens", "seconds"]
Tests = Mapping[Tuple[str, Optional[int], int], Mapping[str, Optional[float]]]
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
        kl, entropy: nats per token.
    """

    step: int
    tokens: int
    seconds: float
    metric: float
    kl: float
    entropy: float


@dataclass(frozen=True)
class RunCurve:
    """One run, step by step. Entry i of a list belongs to training step i; `tokens` and `seconds` are sums so far.

    Attributes:
        metric: what `Validation.metric` is: "solve_rate" or "reward".
        reward, kl, entropy, grad_norm: of the step (KL and entropy in nats per token).
        validations: in order, the base model's (step 0) first.
        peak_gib: largest memory; None before the first step.
        complete: all steps of its config are trained and validated.
    """

    method: str
    seed: int
    metric: str
    tokens: List[int]
    seconds: List[float]
    reward: List[float]
    kl: List[float]
    entropy: List[float]
    grad_norm: List[float]
    validations: List[Validation]
    peak_gib: Optional[float]
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
        GradeError: there is not even a validation of the base model, or a line or step is missing in the middle.
    """
    rows = _rows(run_dir / "metrics.jsonl")
    validated = [row for row in rows if "validation/reward" in row]
    steps = [row for row in rows if "validation/reward" not in row]
    if not validated or validated[0]["step"] != 0:
        raise GradeError(f"{run_dir} holds no validation of the base model yet: start this run (again).")
    if [row["step"] for row in steps] != list(range(len(steps))) or validated[-1]["step"] > len(steps):
        raise GradeError(f"{run_dir}/metrics.jsonl lacks steps. Run it again (--train.overwrite true).")
    tokens = list(accumulate(int(row["tokens"]) for row in steps))
    seconds = list(accumulate(sum(v for k, v in row.items() if k.startswith("seconds/")) for row in steps))
    metric = "solve_rate" if "validation/solve_rate" in validated[0] else "reward"
    config = run_dir / "config.yaml"
    planned = yaml.safe_load(config.read_text(encoding="utf-8"))["train"]["steps"] if config.is_file() else None
    return RunCurve(
        method=method, seed=seed, metric=metric, tokens=tokens, seconds=seconds,
        reward=[row["reward"] for row in steps], kl=[row["kl"] for row in steps],
        entropy=[row["entropy"] for row in steps], grad_norm=[row["grad_norm"] for row in steps],
        validations=[
            Validation(
                step=row["step"], tokens=([0] + tokens)[row["step"]], seconds=([0.0] + seconds)[row["step"]],
                metric=row[f"validation/{metric}"], kl=row["validation/kl"], entropy=row["validation/entropy"],
            )
            for row in validated
        ],
        peak_gib=max((row["memory/peak_gib"] for row in steps), default=None),
        complete=len(steps) == planned == validated[-1]["step"],
    )


def _rows(path: Path) -> List[dict]:
    """The rows of a log; a last line that is still being written, or was cut short, is left out."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise GradeError(f"{path}: line {number} is broken. Run it again (--train.overwrite true).") from error
    return rows


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


def best_within(
    curve: RunCurve, *, tokens: Optional[float] = None, seconds: Optional[float] = None
) -> Optional[Validation]:
    """The validation with the highest metric (the earliest of equals) within the budget; None if there is none.

    A cost may exceed the budget by `SLACK`: responses differ in length, so runs of equally many steps differ a little
    in tokens, and the smallest total would cut off the last validation of all the others. The base model (step 0) is
    what a run starts from, not what it found: it counts only where nothing else is within the budget.
    """
    within = _within(curve, tokens=tokens, seconds=seconds)
    trained = [v for v in within if v.step > 0]
    return max(trained or within, key=lambda v: v.metric, default=None)


def _within(curve: RunCurve, *, tokens: Optional[float] = None, seconds: Optional[float] = None) -> List[Validation]:
    limits = [math.inf if limit is None else limit * (1 + SLACK) for limit in (tokens, seconds)]
    return [v for v in curve.validations if v.tokens <= limits[0] and v.seconds <= limits[1]]


# -- the table -----------------------------------------------------------------------------------------------


def table(curves: Sequence[RunCurve], tests: Tests, *, budget: BudgetKind) -> List[dict]:
    """One row for the base model, then one per method, in the order of `curves`.

    Args:
        curves: all runs; `common_budgets` of them is the budget.
        tests: (method, seed, step of `best_within`) -> its results on test prompts, and ("base", None, 0) -> the base
            model's: "reward", "solve_rate", "kl", "entropy", "judge", "perplexity". All may be missing.
        budget: which cost is equal.

    Returns:
        Rows ready for JSON: "method", "seeds", "unfinished" (runs), "metric" ("reward" or "solve_rate": what "best"
        and "gap" are in), "best_steps", "threshold" (the base's metric plus `THRESHOLD` of the best run's
        improvement; None if no run improved), "reached" (seeds that had a validation of at least that within the
        budget), and numbers: None, or {"mean", "stderr", "n"} over seeds, "stderr" None where n is 1.
        "test/<key>": of the chosen checkpoint. "best": its validation. "gap": "best" minus test.
        "steps_to", "tokens_to", "seconds_to": cost of the first validation at the threshold, None unless every seed
        reached it. "grad_norm/median", "grad_norm/p90", "grad_norm/max": over a run's steps. "step_seconds": a run's
        median. "peak_gib".
    """
    limit = {budget: getattr(common_budgets(curves), budget)}
    base = curves[0].validations[0].metric  # fixed prompts and noise: the base model is the same in every run
    peak = max(best_within(curve, **limit).metric for curve in curves)
    threshold = base + THRESHOLD * (peak - base) if peak > base else None
    rows = [
        {
            "method": "base", "seeds": [], "unfinished": 0, "metric": curves[0].metric, "best_steps": [],
            "threshold": threshold, "reached": None, "best": _stat([base]),
            **_test_numbers(curves[0].metric, [(base, tests.get(("base", None, 0), {}))]),
        }
    ]
    for method in dict.fromkeys(curve.method for curve in curves):
        rows.append(_method_row([c for c in curves if c.method == method], tests, limit, threshold))
    return rows


def _method_row(runs: List[RunCurve], tests: Tests, limit: Dict[str, float], threshold: Optional[float]) -> dict:
    best = [best_within(run, **limit) for run in runs]
    reached = [v for v in (_first_reaching(run, threshold, limit) for run in runs) if v is not None]
    found = [(v.metric, tests.get((run.method, run.seed, v.step), {})) for run, v in zip(runs, best, strict=True)]
    metric, all_reached, trained = runs[0].metric, len(reached) == len(runs), [run for run in runs if run.tokens]
    return {
        "method": runs[0].method, "seeds": [run.seed for run in runs],
        "unfinished": sum(not run.complete for run in runs), "metric": metric, "best_steps": [v.step for v in best],
        "threshold": threshold, "reached": len(reached), "best": _stat(v.metric for v in best),
        **_test_numbers(metric, found),
        "steps_to": _stat(v.step for v in reached) if all_reached else None,
        "tokens_to": _stat(v.tokens for v in reached) if all_reached else None,
        "seconds_to": _stat(v.seconds for v in reached) if all_reached else None,
        "grad_norm/median": _stat(statistics.median(run.grad_norm) for run in trained),
        "grad_norm/p90": _stat(sorted(run.grad_norm)[len(run.grad_norm) * 9 // 10] for run in trained),
        "grad_norm/max": _stat(max(run.grad_norm) for run in trained),
        "step_seconds": _stat(statistics.median(_differences(run.seconds)) for run in trained),
        "peak_gib": _stat(run.peak_gib for run in trained),
    }


def _first_reaching(run: RunCurve, threshold: Optional[float], limit: Dict[str, float]) -> Optional[Validation]:
    if threshold is None:
        return None
    return next((v for v in _within(run, **limit) if v.metric >= threshold), None)


def _test_numbers(metric: str, found: Sequence[Tuple[float, Mapping[str, Optional[float]]]]) -> Dict[str, object]:
    """Means of test results, and of validation minus test, from (validation metric, test result) per seed."""
    names = ("reward", "solve_rate", "kl", "entropy", "judge", "perplexity")
    return {
        **{f"test/{name}": _stat(test.get(name) for _, test in found) for name in names},
        "gap": _stat(best - test[metric] for best, test in found if test.get(metric) is not None),
    }


def _differences(sums: Sequence[float]) -> List[float]:
    return [after - before for before, after in zip([0.0, *sums], sums)]  # noqa: B905  one sum fewer


def _stat(values: Iterable[Optional[float]]) -> Optional[dict]:
    """Mean, standard error and number of the values that are there; None of none."""
    known = [v for v in values if v is not None]
    if not known:
        return None
    stderr = statistics.stdev(known) / len(known) ** 0.5 if len(known) > 1 else None
    return {"mean": statistics.fmean(known), "stderr": stderr, "n": len(known)}


# -- showing it ----------------------------------------------------------------------------------------------

# Key of a row's number, title, digits after the point.
_QUALITY = (
    ("test/reward", "test reward", 3), ("test/solve_rate", "test solve rate", 3), ("best", "best validation", 3),
    ("gap", "validation − test", 3), ("test/judge", "judge", 3), ("test/kl", "KL, nats / token", 3),
    ("test/entropy", "entropy, nats / token", 2), ("test/perplexity", "perplexity", 1),
)
_COST = (
    ("steps_to", f"steps to {THRESHOLD:.0%}", 0), ("tokens_to", f"tokens to {THRESHOLD:.0%}", 0),
    ("seconds_to", f"seconds to {THRESHOLD:.0%}", 0),
    ("step_seconds", "s/step", 2), ("peak_gib", "peak GiB", 2), ("grad_norm/median", "gradient norm, median", 3),
    ("grad_norm/p90", "90%", 3), ("grad_norm/max", "max", 3),
)
_NARROW = ("test/reward", "test/solve_rate", "best", "test/judge", "test/kl", "steps_to")  # fits a terminal
Columns = Sequence[Tuple[str, str, int]]


def markdown(rows: Sequence[dict], budget: BudgetKind, budgets: Budgets) -> str:
    """GitHub tables of `table`'s rows: quality, then cost, with a line that says what they mean."""
    amount = f"{budgets.tokens:,} generated tokens" if budget == "tokens" else f"{budgets.seconds:,.0f} s of training"
    note = (
        f"Best checkpoint by validation within {amount} per run; mean ± standard error over seeds (– for one seed)."
        + _threshold_note(rows)
    )
    return "\n\n".join([note, _markdown_table(rows, _QUALITY), _markdown_table(rows[1:], _COST)]) + "\n"


def _markdown_table(rows: Sequence[dict], columns: Columns) -> str:
    columns = _with_values(rows, columns)
    titles = ["method", "seeds", *(title for _, title, _ in columns)]
    lines = [titles, ["---", *("---:" for _ in titles[1:])], *(_cells(row, columns) for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def rich_table(rows: Sequence[dict], title: str) -> Table:
    """The main columns of `table`'s rows, for the terminal."""
    columns = _with_values(rows, [column for column in (*_QUALITY, *_COST) if column[0] in _NARROW])
    shown = Table(title=title, caption="± standard error over seeds." + _threshold_note(rows))
    for i, name in enumerate(("method", "seeds", *(title for _, title, _ in columns))):
        shown.add_column(name, justify="right" if i else "left", overflow="fold", no_wrap=i == 0)
    for row in rows:
        shown.add_row(*_cells(row, columns))
    return shown


def _threshold_note(rows: Sequence[dict]) -> str:
    threshold = rows[0]["threshold"]
    if threshold is None:
        return " No run improved on the base model."
    return f" {THRESHOLD:.0%}: of the way from the base model to the best run, a validation of {threshold:.3f}."


def _with_values(rows: Sequence[dict], columns: Columns) -> Columns:
    """Without what no row has; a threshold that nobody reached is something to say."""
    return [c for c in columns if c[0].endswith("_to") or any(row.get(c[0]) is not None for row in rows)]


def _cells(row: dict, columns: Columns) -> List[str]:
    count = len(row["seeds"])
    seeds = str(count or "–") + (f" ({row['unfinished']} unfinished)" if row["unfinished"] else "")
    return [row["method"], seeds, *(_cell(row, key, digits) for key, _, digits in columns)]


def _cell(row: dict, key: str, digits: int) -> str:
    number = row.get(key)
    if number is None:
        return f"not reached ({row['reached']} of {len(row['seeds'])})" if key.endswith("_to") and row["seeds"] else "–"
    if not row["seeds"]:  # the base model does not depend on the seed
        return f"{number['mean']:,.{digits}f}"
    stderr = "–" if number["stderr"] is None else f"{number['stderr']:,.{digits}f}"
    return f"{number['mean']:,.{digits}f} ± {stderr}"


def write_comparison(path: Path, payload: object) -> None:
    """Write JSON, replaced as a whole; numbers that JSON does not have (NaN, infinities) become null."""
    write_evaluations(path, _finite(payload))


def _finite(value):
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

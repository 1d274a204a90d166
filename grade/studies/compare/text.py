"""A comparison as text: the rows of `comparison.py` as Markdown and for the terminal, with the notes below them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rich import box
from rich.console import RenderableType

from grade.machine import machine_line
from grade.studies.compare.comparison import THRESHOLD, BudgetKind, Budgets
from grade.studies.compare.frontier_text import frontier_markdown
from grade.tables import Column, Table, numbers

TITLES: dict[BudgetKind, str] = {"tokens": "Equal generated tokens", "seconds": "Equal training time"}
# Key of a row's number, title, digits after the point.
_QUALITY = (
    ("test/reward", "test reward", 3),
    ("test/objective", "test objective", 3),
    ("test/solve_rate", "test solve rate", 3),
    ("best", "best validation", 3),
    ("gap", "validation − test", 3),
    ("test/judge", "judge", 3),
    ("test/kl", "KL, nats / token", 3),
    ("test/entropy", "entropy, nats / token", 2),
    ("test/perplexity", "perplexity", 1),
    ("test/nats_per_byte", "nats / byte", 3),
    ("test/repetition", "repetition", 3),
    ("test/length_distance", "length, distance", 1),
    ("test/entropy_distance", "entropy, distance", 2),
)
_COST = (
    ("used_tokens", "tokens used", 0),
    ("used_seconds", "seconds used", 0),
    ("steps_to", f"steps to {THRESHOLD:.0%}", 0),
    ("tokens_to", f"tokens to {THRESHOLD:.0%}", 0),
    ("seconds_to", f"seconds to {THRESHOLD:.0%}", 0),
    ("step_seconds", "s/step", 2),
    ("peak_gib", "peak GiB", 2),
    ("grad_norm/median", "gradient norm, median", 3),
    ("grad_norm/p90", "90%", 3),
    ("grad_norm/max", "max", 3),
)
# What the terminal shows.
_NARROW = (
    ("test/reward", "test reward", 3),
    ("test/objective", "test obj.", 3),
    ("test/solve_rate", "solve rate", 3),
    ("best", "best valid.", 3),
    ("test/judge", "judge", 3),
    ("test/nats_per_byte", "nats / byte", 3),
    ("test/kl", "KL / token", 3),
    ("steps_to", f"steps to {THRESHOLD:.0%}", 0),
)
Columns = Sequence[tuple[str, str, int]]


def document(payload: dict) -> str:
    """comparison.json as Markdown: both tables, the frontier, learning rates, judge, failures, machine."""
    budgets = Budgets(**payload["budgets"])
    seeds = ", ".join(map(str, payload["seeds"]))
    parts = [f"# {payload['config']['name']}: {', '.join(payload['methods'])}; seeds {seeds}"]
    for budget, title in TITLES.items():
        parts.append(f"## {title}\n\n{markdown(payload['tables'][budget], budget, budgets).rstrip()}")
    if payload.get("frontier") is not None:  # files of earlier versions have none
        parts.append(f"## Frontier\n\n{frontier_markdown(payload['frontier']).rstrip()}")
    return "\n\n".join([*parts, notes(payload)]) + "\n"


def notes(payload: dict) -> str:
    """What stands below the tables: the objective, learning rates, judge, missing checkpoints, failures, machine."""
    method, metric = payload["config"]["method"], payload["tables"]["tokens"][0]["metric"].replace("_", " ")
    unit = "response" if method["kl_reduction"] == "sequence_sum" else "token"
    lines = [
        f"Objective, which learning rates and checkpoints are chosen by: {metric} − {method['kl_coef']:g} · KL "
        f"(nats per {unit})."
    ]
    if (target := method.get("target_kl")) is not None:
        lines[0] += f" In training the KL's weight goes from {method['kl_coef']:g}, steered to a KL of {target:g}."
    rates = ", ".join(f"{method} {rate:g}" for method, rate in payload["learning_rates"].items())
    lines.append(f"Learning rates, by the sweep: {rates}." if payload["sweep"] else f"Learning rates: {rates}.")
    schedules = payload.get("schedules", {})  # files of earlier versions have none
    if len({trial.get("schedule") for trial in payload["sweep"]}) > 1:
        lines.append(f"Schedules, likewise: {', '.join(f'{method} {name}' for method, name in schedules.items())}.")
    lines += [f"The sweep's best rate of {method} is the {edge} it tried." for method, edge in _at_edge(payload)]
    if payload["judge"] is not None:
        accuracy = ", ".join(f"{value:.3f} on the first {text}" for text, value in payload["judge"]["accuracy"].items())
        lines.append(f"The judge's held-out accuracy: {accuracy}.")
    if payload.get("fluency") is not None:
        lines.append(
            f"Nats per byte: of the responses' text, given the prompts, under {payload['fluency']}; lower reads "
            "better. Repetition: share of 4-grams that stood in the response before. Distances: Wasserstein, of the "
            "lengths (tokens) and mean entropies (nats) of responses from the base model's."
        )
    lines += _untrained(payload)
    lines += [f"Failed: {name}: {reason}" for name, reason in payload["failures"].items()]
    if payload["failures"]:
        lines.append("The same command tries failed runs again; one whose folder is deleted starts anew.")
    jobs = payload["config"]["compare"]["jobs"]
    lines.append(f"{jobs} run{'s' * (jobs > 1)} at a time. {machine_line(payload['machine'])}")
    return "\n".join(lines)


def _at_edge(payload: dict) -> list[tuple[str, str]]:
    """(method, "lowest" or "highest") where a better learning rate may lie beyond those tried."""
    found = []
    for method, rate in payload["learning_rates"].items():
        tried = [trial["learning_rate"] for trial in payload["sweep"] if trial["method"] == method]
        if tried and rate in (min(tried), max(tried)):
            found.append((method, "lowest" if rate == min(tried) else "highest"))
    return found


def _untrained(payload: dict) -> list[str]:
    """A line for each method whose row has the base model's numbers in it, by budget."""
    lines = []
    for budget, rows in payload["tables"].items():
        for row in (row for row in rows if row.get("untrained")):
            amount, seeds = _amount(budget, Budgets(**payload["budgets"])), row["untrained"]
            lines.append(
                f"Within {amount}, {row['method']} had no validated checkpoint for seed{'s' * (len(seeds) > 1)} "
                f"{', '.join(map(str, seeds))}: the base model's numbers stand in."
            )
    return lines


def _amount(budget: BudgetKind, budgets: Budgets) -> str:
    if budget == "tokens":
        return f"{budgets.tokens:,} generated tokens"
    return f"{budgets.seconds:{',.0f' if budgets.seconds >= 100 else '.3g'}} s of training"


def markdown(rows: Sequence[dict], budget: BudgetKind, budgets: Budgets) -> str:
    """GitHub tables of `table`'s rows: quality, then cost, with a line that says what they mean."""
    note = (
        f"Best checkpoint by the objective on validation within {_amount(budget, budgets)} per run; mean ± standard "
        f"error over seeds (– for one seed).{_threshold_note(rows)}"
    )
    tables = (_table(rows, _QUALITY), _table(rows[1:], _COST))
    return "\n\n".join([note, *(table.markdown(spaced=True) for table in tables)]) + "\n"


def rich_table(rows: Sequence[dict], title: str) -> RenderableType:
    """The main columns of `table`'s rows, for the terminal."""
    shown = _table(rows, _NARROW, title, "± standard error over seeds." + _threshold_note(rows))
    shown = replace(shown, rows=[[str(cell).removesuffix(" ± –") for cell in row] for row in shown.rows])
    return shown.rich(box=box.SIMPLE_HEAD)


def _table(rows: Sequence[dict], columns: Columns, title: str = "", caption: str = "") -> Table:
    """Without columns that no row has; a threshold that nobody reached is something to say."""
    columns = [c for c in columns if c[0].endswith("_to") or any(row.get(c[0]) is not None for row in rows)]
    heads = [Column("method"), *numbers(["seeds", *(title for _, title, _ in columns)])]
    return Table(title, heads, [_cells(row, columns) for row in rows], caption)


def _threshold_note(rows: Sequence[dict]) -> str:
    threshold = rows[0]["threshold"]
    if threshold is None:
        return " No run improved on the base model."
    return f" {THRESHOLD:.0%}: of the way from the base model to the best run, a validation of {threshold:.3f}."


def _cells(row: dict, columns: Columns) -> list[str]:
    count = len(row["seeds"])
    seeds = str(count or "–") + (f" ({row['unfinished']} not done)" if row["unfinished"] else "")
    return [row["method"], seeds, *(_cell(row, key, digits) for key, _, digits in columns)]


def _cell(row: dict, key: str, digits: int) -> str:
    number = row.get(key)
    if number is None:
        return f"not reached ({row['reached']} of {len(row['seeds'])})" if key.endswith("_to") and row["seeds"] else "–"
    if not row["seeds"]:  # the base model does not depend on the seed
        return f"{number['mean']:,.{digits}f}"
    stderr = "–" if number["stderr"] is None else f"{number['stderr']:,.{digits}f}"
    return f"{number['mean']:,.{digits}f} ± {stderr}"

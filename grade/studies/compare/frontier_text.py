"""The frontier as tables: each measure at common KLs, a row a method. Needs no model."""

from __future__ import annotations

from grade.studies.compare.frontier import MEASURES
from grade.tables import Cell, Column, Estimate, Table

SHOWN = ("reward", "judge", "nats_per_byte", "solve_rate", "repetition")
"""The measures that tables and figures are made of, where they are known."""

_WITHIN = (
    "within KL(policy‖base) of so many nats a response: checkpoints of a seed joined by straight lines over √KL; mean "
    "± standard error over seeds; – where a seed does not reach that KL."
)
_BEST_OF = (
    "Best of n of the base model's own responses by the reward, means over all subsets of n; KL is at most log n − "
    "(n − 1) / n nats a response."
)


def frontier_tables(frontier: dict) -> list[Table]:
    """A table for each measure, the reward's first.

    Args:
        frontier: of comparison.json.
    """
    table = frontier["table"]
    shown = [name for name in SHOWN if name == SHOWN[0] or any(name in row for row in table["rows"])]
    return [_table(name, table) for name in shown]


def _table(measure: str, table: dict) -> Table:
    title, digits = MEASURES[measure]
    columns = [Column("method"), Column("seeds", right=True)]
    columns += [Column(f"{title} at KL {kl:g}", digits, right=True) for kl in table["kls"]]
    rows: list[list[Cell]] = [
        [row["method"], str(len(row["seeds"]) or "–"), *_cells(row.get(measure, []), len(table["kls"]))]
        for row in table["rows"]
    ]
    return Table(f"frontier_{measure}", columns, rows, caption(measure))


def _cells(found: list[dict | None], count: int) -> list[Cell]:
    """As many cells as there are KLs: a measure that a method lacks has no values."""
    known: list[Cell] = [None if one is None else Estimate(one["mean"], one.get("stderr"), one["n"]) for one in found]
    return [*known, *[None] * count][:count]


def best_of_table(frontier: dict) -> Table | None:
    """The base model's best of each n; None where it was not asked for."""
    rows = frontier["best_of"]
    shown = [name for name in SHOWN if any(row.get(name) is not None for row in rows)]
    columns = [Column("n", 0), Column("KL, at most", 3), *(Column(*MEASURES[name]) for name in shown)]
    cells: list[list[Cell]] = [[row["n"], row["kl_sequence"], *(row.get(name) for name in shown)] for row in rows]
    return Table("frontier_best_of", columns, cells, _BEST_OF) if rows else None


def caption(measure: str) -> str:
    """What a table of this measure shows."""
    title, _ = MEASURES[measure]
    chosen = "The highest reward" if measure == "reward" else f"The {title} of the checkpoints with the highest reward"
    return f"{chosen} {_WITHIN}"


def frontier_markdown(frontier: dict) -> str:
    """GitHub tables of the frontier, with lines that say what they mean."""
    if not frontier["table"]["kls"]:
        return f"No method has moved from the base model, on {frontier['prompts']} test prompts: no frontier.\n"
    note = (
        f"On {frontier['prompts']} test prompts, the highest reward {_WITHIN} Other measures are those of the "
        "checkpoints that the reward chose."
    )
    parts = [note, *(table.markdown(spaced=True) for table in frontier_tables(frontier))]
    best = best_of_table(frontier)
    if best is not None:
        parts += [best.caption, best.markdown(spaced=True)]
    return "\n\n".join(parts) + "\n"

"""variance.json as text: for the terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from rich import box
from rich.console import RenderableType

from grade.machine import machine_line
from grade.tables import Column, Table, numbers

# Key of a row's number, title, format.
_COLUMNS = (
    ("mean_norm", "norm of mean", ".3g"),
    ("trace", "variance", ".3g"),
    ("relative_variance", "relative variance", ".3g"),
    ("snr_per_sample", "SNR / sample", ".2e"),
    ("snr_per_second", "SNR / s", ".2e"),
    ("seconds_per_sample", "s / sample", ".3f"),
    ("bias", "bias", ".2f"),
    ("scale", "scale", ".2f"),
    ("cosine", "cosine", ".2f"),
    ("tensor_norm_std", "std of tensor norms", ".2g"),
)
_NARROW = ("relative_variance", "snr_per_second", "scale", "cosine", "tensor_norm_std")
NOTES = (
    "norm of mean: of the mean gradient, noise included. variance: trace of the covariance of a draw, times its "
    "responses. relative variance: that over the squared norm of the expected gradient, noise taken out (above a "
    "number: no signal stands out of the noise). SNR: its inverse, per response and per second of sampling and "
    "differentiating alone, in batches of a draw. bias: ‖E g − reference‖ / ‖reference‖, noise taken out; scale: "
    "length of the part along the reference, over the reference's; cosine: with it. Brackets: 95 % intervals. std of "
    "tensor norms: standard deviation over parameter tensors of their gradients' norms, mean over draws, which the "
    "published code calls gradient variance. All responses have one length: what choosing end-of-sequence does is not "
    "in here."
)


def document(payload: dict) -> str:
    """variance.json as Markdown."""
    parts = [measured(payload)]
    for (length, top_k), rows in _groups(payload).items():
        titles = numbers(["draws", *(title for _, title, _ in _COLUMNS), "verdict"])
        shown = Table(
            "",
            [Column("estimator"), *titles],
            [[name_of(row), str(row["draws"]), *_cells(row, _COLUMNS), row["verdict"]] for row in rows],
        )
        parts.append(f"## {length} tokens, {top_k} candidates\n\n{shown.markdown()}")
    return "\n\n".join([*parts, NOTES, machine_line(payload["machine"])]) + "\n"


def measured(payload: dict) -> str:
    """What the draws were and whose gradient they gave, as far as the file says; a sentence."""
    drawn = payload.get("config", {}).get("variance", {})
    weights = "the adapter's initial state" if payload.get("adapter_sha256") is None else "a trained adapter"
    if not {"responses", "samples_per_prompt", "seed"} <= drawn.keys():
        return f"Repeated draws; {weights}."
    return (
        f"Draws of {drawn['responses']} responses, {drawn['samples_per_prompt']} to a prompt, seed {drawn['seed']}; "
        f"{weights}."
    )


def rich_table(payload: dict) -> RenderableType:
    """The same for the terminal, narrower."""
    columns = [column for column in _COLUMNS if column[0] in _NARROW]
    groups = _groups(payload)
    return Table(
        "Gradient estimators at fixed parameters",
        [Column("S"), Column("k"), Column("estimator"), *numbers(title for _, title, _ in columns), Column("verdict")],
        [
            [str(length), str(top_k), name_of(row), *_cells(row, columns), row["verdict"]]
            for (length, top_k), rows in groups.items()
            for row in rows
        ],
        NOTES,
    ).rich(keys=3, ends=[after - 1 for after in accumulate(map(len, groups.values()))], box=box.SIMPLE_HEAD)


def name_of(row: dict) -> str:
    """A row's estimator in words."""
    if row["estimator"] is None:
        return row["method"]
    hops = row["hops"] if isinstance(row["hops"], str) else f"{row['hops']} hop{'s' * (row['hops'] != 1)}"
    tau = "" if row["tau"] is None else f" τ {row['tau']:g},"
    return f"{row['method']} {row['estimator']},{tau} {hops}"


def _groups(payload: dict) -> dict:
    """Rows by length and number of candidates."""
    groups: dict = {}
    for row in payload["rows"]:
        groups.setdefault((row["length"], row["top_k"]), []).append(row)
    return groups


def _cells(row: dict, columns: Sequence[tuple[str, str, str]]) -> list[str]:
    return [_cell(row, key, form) for key, _, form in columns]


def _cell(row: dict, key: str, form: str) -> str:
    value: float | None = row.get(key)
    low, high = row.get(f"{key}_interval") or (None, None)
    if value is None:
        return "–" if low is None else f"> {low:{form}}"
    if low is None:
        return f"{value:{form}}"
    return f"{value:{form}} [{low:{form}}, {'∞' if high is None else format(high, form)}]"

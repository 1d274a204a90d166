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
# Of rows that have steps.
_STEPS = (
    ("plain_step", "plain step", ".2g"),
    ("plain_share", "of the best", ".2f"),
    ("plain_ceiling", "plain, no noise", ".2g"),
    ("plain_step_per_second", "plain² / s", ".2g"),
    ("natural_step", "natural step", ".2g"),
    ("natural_share", "of the best", ".2f"),
    ("natural_ceiling", "natural, no noise", ".2g"),
    ("factor", "length factor", ".2f"),
    ("fisher_factor", "Fisher length factor", ".2f"),
)
_NARROW_STEPS = ("plain_step", "factor")
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

STEP_NOTES = (
    "plain step: moving the logits of a token along one response's gradient raises the expected reward (KL's weight "
    "included) by this times √(2 KL) for a step of a small KL in nats, mean over prefixes; natural step: the same with "
    "the gradient preconditioned by the inverse Fisher information of the token's distribution. of the best: over what "
    "the exact natural gradient gains (above a number: that does not stand out of the noise). no noise: of infinitely "
    "many responses, which only the bias lowers. plain² / s: square of the plain step of as many responses as a second "
    "gives, as long as noise rules it. length factor: what gives the gradient through tokens the exact one's length "
    "along itself at the logits; measured at path_scale 1: it is the value that method.path_scale should make up for. "
    "Fisher length factor: with the inverse Fisher information between. Brackets: 95 % intervals."
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
        if stepping := [row for row in rows if "prefixes" in row]:
            parts += [_steps_table(stepping).markdown(), best_step(stepping[0])]
    return "\n\n".join([*parts, notes(payload["rows"]), machine_line(payload["machine"])]) + "\n"


def _steps_table(rows: list[dict]) -> Table:
    titles = numbers(["prefixes", *(title for _, title, _ in _STEPS)])
    cells = [[name_of(row), str(row["prefixes"]), *_cells(row, _STEPS)] for row in rows]
    return Table("", [Column("estimator"), *titles], cells)


def best_step(row: dict) -> str:
    """What the best step gains for its KL, where that is known; a sentence."""
    low, high = row.get("best_interval") or (None, None)
    if low is None:
        return "Too few prefixes for steps."
    if row.get("best") is None:
        return f"The best step gains at most {high:.2g} times √(2 KL)."
    return f"The best step gains {row['best']:.2g} [{low:.2g}, {high:.2g}] times √(2 KL)."


def notes(rows: list[dict]) -> str:
    """What the columns of these rows mean."""
    return f"{NOTES} {STEP_NOTES}" if any("prefixes" in row for row in rows) else NOTES


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
    if any("prefixes" in row for row in payload["rows"]):
        columns += [column for column in _STEPS if column[0] in _NARROW_STEPS]
    groups = _groups(payload)
    return Table(
        "Gradient estimators at fixed parameters",
        [Column("S"), Column("k"), Column("estimator"), *numbers(title for _, title, _ in columns), Column("verdict")],
        [
            [str(length), str(top_k), name_of(row), *_cells(row, columns), row["verdict"]]
            for (length, top_k), rows in groups.items()
            for row in rows
        ],
        notes(payload["rows"]),
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

"""A measurement of `benchmarks.training` as Markdown and CSV."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.training_floors import table as floors
from benchmarks.training_setup import ALGORITHMS
from grade.tables import Column, Table, numbers

_CSV = (
    "algorithm",
    "length",
    "status",
    "steps",
    "seconds",
    "seconds_p20",
    "seconds_p80",
    "tokens_per_second",
    "peak_gib",
    "step_gib",
    "tensors_gib",
    "hops",
    "gradient_error",
    "extrapolated_seconds",
    "extrapolated_peak_gib",
    "extrapolated_tensors_gib",
)


def document(payload: dict) -> str:
    """The tables, growth exponents and machine."""
    setting = payload["setting"]
    head = (
        f"{setting['shape']}, {setting['dtype']}, B = {setting['batch']}, P = {setting['prompt']}, k = {setting['k']}, "
        f"τ = {setting['tau']:g}, hop_tol = {setting['hop_tol']:g}."
    )
    machine = ", ".join(f"{name} {value}" for name, value in payload["machine"].items())
    tables = (text(payload["rows"]) for text in (comparison, phases, exponents))
    parts = [head, checked(payload["check"]), *tables, compiling(payload["rows"]), floors(payload)]
    return "\n\n".join([*filter(None, parts), f"Machine: {machine}."]) + "\n"


def checked(check: dict[str, float]) -> str:
    """What was compared before anything was timed."""
    if not check:
        return ""
    errors = ", ".join(f"{ALGORITHMS[name]} {error:.1e}" for name, error in check.items())
    return f"Gradients of one short step in float32 with all hops, relative difference from replay's: {errors}."


def comparison(rows: list[dict]) -> str:
    """Time and memory, and both against the first algorithm's, which is the published one unless it was left out."""
    titles = (
        "s / step",
        "tokens/s",
        "peak, GiB",
        "tensors, GiB",
        "hops",
        "gradient, error",
        "times faster",
        "memory, peak",
        "memory, tensors",
    )
    lines = []
    for row in rows:
        base = next(r for r in rows if r["length"] == row["length"] and r["algorithm"] == rows[0]["algorithm"])
        lines.append([str(row["length"]), ALGORITHMS[row["algorithm"]], *_cells(row, base)])
    return _table(titles, lines)


def _table(titles: Iterable[str], rows: Sequence[Sequence[str]]) -> str:
    """Numbers beside length and algorithm."""
    return Table("", [*numbers(["S"]), Column("algorithm"), *numbers(titles)], rows).markdown()


def _cells(row: dict, base: dict) -> list[str]:
    memory = [_number(row, key, ".2f") for key in ("peak_gib", "tensors_gib")]
    if row["status"] != "ok":
        return [_number(row, "seconds", ".3g"), row["status"], *memory, *["–"] * 5]
    spread = f" ({row['seconds_p20']:.3g}–{row['seconds_p80']:.3g})" if row["steps"] > 2 else ""
    error, hops = row.get("gradient_error"), row["hops"]
    return [
        f"{row['seconds']:.3g}{spread}",
        f"{row['tokens_per_second']:.3g}",
        *memory,
        "–" if hops is None else f"{hops:.1f}",
        "–" if error is None else f"{error:.1e}",
        _ratio(base, row, "seconds", ""),
        _ratio(base, row, "peak_gib", "1/"),
        _ratio(base, row, "tensors_gib", "1/"),
    ]


def _value(row: dict, key: str) -> tuple[float | None, str]:
    """(measured or extrapolated, "~" of the latter)."""
    if row.get(key) is not None:
        return row[key], ""
    return row.get(f"extrapolated_{key}"), "~"


def _number(row: dict, key: str, form: str) -> str:
    value, mark = _value(row, key)
    return "–" if value is None else f"{mark}{value:{form}}"


def _ratio(base: dict, row: dict, key: str, before: str) -> str:
    (theirs, mark), (ours, our_mark) = _value(base, key), _value(row, key)
    return "–" if not theirs or not ours else f"{mark or our_mark}{before}{theirs / ours:.3g}"


_NOT_IN_ROWS = {
    "compiled": f"The first step of {ALGORITHMS['compiled']}, which compiles, is",
    "layers": f"Compiling the layers of {ALGORITHMS['layers']}, and the first step, which compiles decoding, are",
}


def compiling(rows: list[dict]) -> str:
    """What the rows of `rollout.compile` and `train.compile` leave out."""
    lines = []
    for name, what in _NOT_IN_ROWS.items():
        found = [row for row in rows if row["algorithm"] == name and row.get("first_seconds")]
        if found:
            first = ", ".join(f"{row['first_seconds']:.0f} s at S = {row['length']}" for row in found)
            lines.append(f"{what} not in its rows: {first}.")
    return "\n\n".join(lines)


def phases(rows: list[dict]) -> str:
    """Seconds of every phase and its share of the step."""
    measured = [row for row in rows if row["status"] == "ok"]
    names = list(dict.fromkeys(name for row in measured for name in row["phases"]))
    lines = []
    for row in measured:
        total = sum(row["phases"].values())
        cells = (
            f"{row['phases'][name]:.3g} s, {row['phases'][name] / total:.0%}" if name in row["phases"] else "–"
            for name in names
        )
        lines.append([str(row["length"]), ALGORITHMS[row["algorithm"]], *cells])
    return _table(names, lines)


def exponents(rows: list[dict]) -> str:
    """How time grows with S, from each length to the next: the e of time ~ S^e."""
    lines = []
    for name, title in ALGORITHMS.items():
        pairs = growth([row for row in rows if row["algorithm"] == name and row["status"] == "ok"])
        if pairs:
            lines.append(f"- {title}: " + ", ".join(f"{e:.2f} from {a} to {b}" for (a, b), e in pairs.items()))
    return "Growth of the seconds per step, the exponent of S:\n\n" + "\n".join(lines) if lines else ""


def growth(rows: list[dict]) -> dict[tuple, float]:
    """{(shorter, longer): exponent} of consecutive lengths."""
    return {
        (a["length"], b["length"]): math.log(b["seconds"] / a["seconds"]) / math.log(b["length"] / a["length"])
        for a, b in zip(rows, rows[1:], strict=False)
    }


def write_csv(path: Path, payload: dict) -> None:
    """One line a row; phases as columns of their own."""
    names = list(dict.fromkeys(name for row in payload["rows"] for name in row.get("phases", {})))
    rows = [
        [*(row.get(key) for key in _CSV), *(row.get("phases", {}).get(name) for name in names)]
        for row in payload["rows"]
    ]
    table = Table("", [Column(title) for title in (*_CSV, *(f"seconds/{name}" for name in names))], rows)
    path.write_text(table.csv(), encoding="utf-8")

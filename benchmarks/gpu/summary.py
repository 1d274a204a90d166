"""What a call's files say: which parts ran, what failed, what was cut, and the tables of what was measured."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.gpu.rows import AGAIN, Rows
from grade.tables import Column, Table, numbers

FILES = {"tests": "tests.jsonl", "kernels": "kernels.jsonl", "training": "training.jsonl"}
TEST_FAILED, MEASUREMENT_FAILED, LEFT, NOT_RUN = 1, 2, 8, 16
"""What an exit status is the sum of."""
SEE_ROWS = "failed: see its rows"
"""Status of a set-up of the kernel table of which a row is to be measured again."""
_SHOWN = 12  # failures that are printed with their reason


def summary(folder: Path) -> tuple[str, int]:
    """(Markdown, exit status) of what is in a folder of results."""
    files = {name: Rows(folder / file, None) for name, file in FILES.items()}
    if not any(rows.heads for rows in files.values()):
        return f"Nothing has been measured in {folder}.\n", NOT_RUN
    head = next(rows.heads[-1] for rows in files.values() if rows.heads)
    machine = ", ".join(f"{name} {value}" for name, value in head.items() if name != "code")
    parts = [part for name, rows in files.items() for part in _parts(name, rows)]
    sections = [
        "# Results of benchmarks/gpu.sh",
        f"Machine: {machine}.",
        kernels(files["kernels"]),
        training(files["training"]),
        _kept(files),
        _failures(files),
        # Last, where the end of a long output is what is looked at.
        Table("", _PARTS, [_line(part) for part in parts]).markdown(),
    ]
    return "\n\n".join(filter(None, sections)) + "\n", _status(files, parts)


_PARTS = [Column("part"), *numbers(["measured", "kept", "failed", "left", "seconds"]), Column("note")]


def _parts(name: str, rows: Rows) -> list[dict]:
    """What became of the parts of a file."""
    found = []
    for part in dict.fromkeys([*rows.plans, *rows.ends]):
        plan = rows.plans.get(part, [])
        there = [key for key in plan if key in rows.latest]
        fresh = [key for key in there if key in rows.fresh]
        end = rows.ends.get(part)
        problems = end["problems"] if end else []
        found.append(
            {
                "file": name,
                "part": part,
                "measured": len(fresh),
                "kept": sum(rows.kept(key) is not None for key in there)
                - sum(rows.kept(key) is not None for key in fresh),
                "failed": [key for key in fresh if rows.kept(key) is None],
                "left": len(plan) - sum(rows.kept(key) is not None for key in plan),
                "seconds": end["seconds"] if end else None,
                "problems": problems if plan else [*problems, "it could not begin"],
            }
        )
    return found


def _line(part: dict) -> list[str]:
    seconds = "–" if part["seconds"] is None else f"{part['seconds']:.0f}"
    left = part["left"] - len(part["failed"])
    counts = [str(count) for count in (part["measured"], part["kept"], len(part["failed"]), left)]
    return [part["part"], *counts, seconds, "; ".join(part["problems"]) or "–"]


def _status(files: dict[str, Rows], parts: list[dict]) -> int:
    failed = {name: any(row["status"].startswith(AGAIN) for row in _counting(rows)) for name, rows in files.items()}
    status = TEST_FAILED if failed["tests"] else 0
    if failed["kernels"] or failed["training"]:
        status |= MEASUREMENT_FAILED
    if any(part["left"] > len(part["failed"]) for part in parts):
        status |= LEFT
    if any(part["problems"] for part in parts) or {part["file"] for part in parts} != set(FILES):
        status |= NOT_RUN
    return status


def _counting(rows: Rows) -> list[dict]:
    """Rows whose failure is one: not those of implementations that ours are compared with, nor of what holds them."""
    return [
        row for row in rows.latest.values() if row.get("implementation", "ours").startswith("ours") and _is_own(row)
    ]


def _is_own(row: dict) -> bool:
    """Not a set-up whose rows say what is wrong."""
    return not row["key"].startswith("set-up ") or row["status"] != SEE_ROWS


def _kept(files: dict[str, Rows]) -> str:
    """Which rows were there before the last call."""
    lines = []
    for name, rows in files.items():
        counts = Counter(
            _group(row)
            for key, row in rows.latest.items()
            if key not in rows.fresh and rows.kept(key) is not None and not key.startswith("set-up ")
        )
        if counts:
            lines.append(f"- {name}: " + "; ".join(f"{group} ({count})" for group, count in counts.items()))
    return "Kept from earlier calls, not measured again:\n\n" + "\n".join(lines) if lines else ""


def _group(row: dict) -> str:
    """What rows are counted together: a file of tests, a kernel in one dtype, a training step."""
    if row.get("kernel"):
        return f"{row['kernel']} {row['dtype']}"
    return row.get("entry") or row["key"].partition("::")[0]


def _failures(files: dict[str, Rows]) -> str:
    bad = [row for rows in files.values() for row in rows.latest.values() if row["status"].startswith(AGAIN)]
    bad = [row for row in bad if _is_own(row)]
    lines = [f"- {row['key']}: {_reason(row)}" for row in bad[:_SHOWN]]
    if len(bad) > _SHOWN:
        lines.append(f"- and {len(bad) - _SHOWN} more, in the files")
    return "Failed:\n\n" + "\n".join(lines) if bad else ""


def _reason(row: dict) -> str:
    """A status with the line of a test's report that says what was wrong."""
    said = [line[1:].strip() for line in row.get("text", "").splitlines() if line.startswith("E ")]
    return f"{row['status']}: {said[0]}"[:300] if said else row["status"]


def kernels(rows: Rows) -> str:
    """A line a set-up: ours, what of the copy bandwidth that is, and how much longer the others take."""
    shown: dict[tuple, dict[str, dict]] = {}
    for row in rows.latest.values():
        if row.get("implementation"):
            place = (row["kernel"], row["variant"], row["dtype"], row["shape"])
            shown.setdefault(place, {})[row["implementation"]] = row
    if not shown:
        return ""
    others = list(dict.fromkeys(name for found in shown.values() for name in found if name != "ours"))
    lines = []
    for (kernel, variant, dtype, shape), found in shown.items():
        ours = found.get("ours", {})
        cells = [_cell(ours, "ms", ".3f"), *(_cell(ours, *one) for one in (("gb_s", ".0f"), ("copy_percent", ".0f")))]
        cells += [
            _cell(ours, "peak_mb", ".1f"),
            _cell(ours, "error", ".0e"),
            f"{ours.get('goal', '')} {ours.get('goal_met', '')}",
        ]
        lines.append(
            [f"{kernel} {variant}", dtype, shape, *cells, *(_cell(found.get(o, {}), "ratio", ".2f") for o in others)]
        )
    titles = ["ms", "GB/s", "% of copy", "peak MB", "error"]
    columns = [Column("kernel"), Column("dtype"), Column("shape"), *numbers(titles), Column("goal")]
    return Table("", [*columns, *numbers(f"{name}, x ours" for name in others)], lines).markdown()


def _cell(row: dict, name: str, form: str) -> str:
    """A number of a row, or why there is none."""
    if row.get("status") == "ok":
        return f"{row[name]:{form}}" if row[name] != "" else "–"
    return row["status"].partition(":")[0][:24] if row else "–"


def training(rows: Rows) -> str:
    """A line an entry, and one a phase with its floor."""
    entries: dict[str, list[dict]] = {}
    for row in rows.latest.values():
        if row["status"] == "ok" and "entry" in row:
            entries.setdefault(row["entry"], []).append(row)
    if not entries:
        return ""
    lines, phases = [], []
    for name, steps in entries.items():
        seconds = [step["seconds"] for step in steps]
        goal = steps[-1].get("goal")
        median = statistics.median(seconds)
        reached = "–" if goal is None else f"<= {goal:g} s: {'met' if median <= goal else 'missed'}"
        first = steps[-1]["first_seconds"]
        hops = steps[-1]["hops"]
        lines.append(
            [
                name,
                str(len(steps)),
                f"{median:.3f} ({min(seconds):.3f}–{max(seconds):.3f})",
                reached,
                f"{max(step['peak_gib'] for step in steps):.2f}",
                "–" if hops is None else f"{hops:.1f}",
                "–" if first is None else f"{first:.1f}",
            ]
        )
        phases += [[name, *cells] for cells in _phases(steps)]
    titles = ["steps", "s / step (least–most)", "goal", "peak GiB", "hops", "first step, s"]
    tables = [Table("", [Column("training step"), *numbers(titles)], lines).markdown()]
    tables.append(Table("", [Column("training step"), Column("phase"), *numbers(_PHASE)], phases).markdown())
    return "\n\n".join(tables)


_PHASE = ("s", "floor, s", "times the floor")


def _phases(steps: Sequence[dict]) -> Iterable[list[str]]:
    for phase in steps[-1]["phases"]:
        seconds = statistics.median(step["phases"][phase] for step in steps)
        least = steps[-1].get("floors", {}).get(phase)
        yield [phase, f"{seconds:.4f}", *(["–", "–"] if not least else [f"{least:.4f}", f"{seconds / least:.1f}"])]

"""A part's rows in a file that is only ever appended to, so that a stop at any moment loses nothing measured.

A row has its `key`, what it is of (`of`: device, versions and code, as `machine.fingerprint` has them), a `status` and
what was measured. The last row of a key counts. Beside rows there are heads, one a call, which say in words what the
rows after them were measured on; plans, the keys that a part consists of; and ends, which say how a part went.
"""

from __future__ import annotations

import datetime
from pathlib import Path

from grade.jsonl import append_rows, read_rows
from grade.shapes import NUMBER, misfit

_SHAPES = {
    "key": {"key": str, "status": str},
    "plan": {"plan": [str], "part": str},
    "machine": {"machine": dict, "at": str},
    "end": {"end": {"seconds": NUMBER, "problems": [str]}, "part": str},
}
"""What a row must be, by the entry that says which kind it is, in the terms of `grade.shapes`."""
AGAIN = ("failed", "stopped", "wrong")
"""What a status begins with that is measured again in the next call: it may have been the machine's fault."""


class Rows:
    """The rows of one file that were measured on one device, with these versions and this code.

    Args:
        of: a `fingerprint`; rows of others stay where they are and count for nothing. None: that of the last head.

    Attributes:
        latest: the last row by key.
        fresh: keys that were measured since the last head.
        plans: the keys of a part, by its name.
        heads: what the calls were made on, the last one last.
        ends: how the parts of the last call went, by name: {"seconds", "problems"}.
    """

    def __init__(self, path: Path, of: str | None):
        self.path = path
        rows = read_rows(path).rows
        if of is None:
            of = next((str(row.get("of")) for row in reversed(rows) if "machine" in row), "")
        self.of = of
        self.latest: dict[str, dict] = {}
        self.fresh: set[str] = set()
        self.plans: dict[str, list[str]] = {}
        self.heads: list[dict[str, str]] = []
        self.ends: dict[str, dict] = {}
        for row in rows:
            self._take(row)

    def _take(self, row: dict) -> None:
        kind = next((name for name in _SHAPES if name in row), None)
        if row.get("of") != self.of or kind is None or misfit(row, _SHAPES[kind]) is not None:
            return  # a damaged one counts for nothing: what it was of is measured again
        if "key" in row:
            self.latest[row["key"]] = row
            self.fresh.add(row["key"])
        elif "plan" in row:
            self.plans[row["part"]] = row["plan"]
        elif "machine" in row:
            self.heads.append({**row["machine"], "date": row["at"]})
            self.fresh, self.ends = set(), {}
        elif "end" in row:
            self.ends[row["part"]] = row["end"]

    def kept(self, key: str) -> dict | None:
        """The row that makes it unnecessary to measure this again."""
        row = self.latest.get(key)
        return None if row is None or row["status"].startswith(AGAIN) else row

    def missing(self, part: str) -> list[str] | None:
        """The keys of a part that are to be measured (again); None: it has not been begun, so they are not known."""
        return [key for key in self.plans[part] if self.kept(key) is None] if part in self.plans else None

    def add(self, key: str, row: dict) -> dict:
        """Append a row; returns it as the file has it."""
        return self._append({**row, "key": key})

    def add_plan(self, part: str, keys: list[str]) -> None:
        """What a part consists of, unless the file says so already."""
        if self.plans.get(part) != keys:
            self._append({"plan": keys, "part": part})

    def begin(self, machine: dict[str, str]) -> None:
        """A call's head. What a stop has left of a row is ended first, so that nothing is appended to it."""
        if self.path.exists() and (content := self.path.read_bytes()) and not content.endswith(b"\n"):
            with self.path.open("ab") as file:
                file.write(b"\n")
        self._append({"machine": machine})

    def end(self, part: str, seconds: float, problems: list[str]) -> None:
        """How a part went: its seconds, and what went wrong beside its rows."""
        self._append({"end": {"seconds": round(seconds, 1), "problems": problems}, "part": part})

    def _append(self, row: dict) -> dict:
        row = {**row, "of": self.of, "at": datetime.datetime.now().isoformat(" ", "seconds")}
        append_rows(self.path, [row])
        self._take(row)
        return row

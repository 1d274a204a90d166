"""What `grade reward CONFIG --check_gradient` has written, as a Markdown table with its verdict.

grade reward imdb_small --check_gradient
python -m benchmarks.gradient_check runs/gradient-check-imdb_small.json
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.saved import new_parser, read_saved
from grade.training.swap_statistics import Agreement, Measured, table, verdict


def main(arguments: list[str] | None = None) -> None:
    parser = new_parser(__doc__)
    parser.add_argument("file", type=Path)
    kind = "a file that grade reward CONFIG --check_gradient has written"
    payload = read_saved(parser.parse_args(arguments).file, kind, "rows", of_rows=("drawn", "pearson"))
    rows = [_agreement(row) for row in payload["rows"]]
    print(f"{table(rows).markdown()}\n\n{verdict(rows)}")


def _agreement(row: dict[str, Any]) -> Agreement:
    values: dict[str, Any] = {n: Measured(**value) if isinstance(value, dict) else value for n, value in row.items()}
    return Agreement(**values)


if __name__ == "__main__":
    main()

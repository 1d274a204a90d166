"""What `grade reward CONFIG --check_gradient` has written, as a Markdown table with its verdict.

grade reward imdb_small --check_gradient
python -m benchmarks.gradient_check runs/gradient-check-imdb_small.json
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.saved import new_parser, read_saved
from grade.training.swap_statistics import Agreement, Measured, table


def main(arguments: list[str] | None = None) -> None:
    parser = new_parser(__doc__)
    parser.add_argument("file", type=Path)
    kind = "a file that grade reward CONFIG --check_gradient has written"
    payload = read_saved(parser.parse_args(arguments).file, kind, "rows", "verdict", of_rows=("drawn", "pearson"))
    rows = [
        Agreement(**{name: Measured(**value) if isinstance(value, dict) else value for name, value in row.items()})
        for row in payload["rows"]
    ]
    print(f"{table(rows).markdown()}\n\n{payload['verdict']}")


if __name__ == "__main__":
    main()

"""The tables of measurements that `grade variance` has made, as Markdown.

python -m benchmarks.variance runs/variance-imdb_small/variance.json                # of your own
python -m benchmarks.variance benchmarks/results/variance-imdb_small/variance.json
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.saved import document_of, new_parser, read_saved
from grade.studies.variance.text import document


def main(arguments: list[str] | None = None) -> None:
    parser = new_parser(__doc__)
    parser.add_argument("file", type=Path, help="a variance.json")
    file = parser.parse_args(arguments).file
    kind = "a variance.json that `grade variance` has written"
    print(document_of(file, read_saved(file, kind, "rows", "config", "machine"), document), end="")


if __name__ == "__main__":
    main()

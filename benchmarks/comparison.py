"""The tables of a comparison that `grade compare` has made, as Markdown.

python -m benchmarks.comparison runs/compare-imdb_small/comparison.json        # of your own
python -m benchmarks.comparison benchmarks/results/compare_imdb_small.json
python -m benchmarks.comparison benchmarks/results/compare_imdb_small.json --budget tokens    # one of its tables
python -m benchmarks.comparison runs/compare-imdb_small/comparison.json --frontier    # reward, judge, ... at equal KL
"""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.saved import new_parser, read_saved
from grade.studies.compare.comparison import Budgets
from grade.studies.compare.frontier_text import frontier_markdown
from grade.studies.compare.text import TITLES, document, markdown

_KIND = "a comparison.json that `grade compare` has written"


def main(arguments: list[str] | None = None) -> None:
    parser = new_parser(__doc__)
    parser.add_argument("file", type=Path, help="a comparison.json")
    parser.add_argument("--budget", choices=TITLES, help="only the tables at equal cost in these")
    parser.add_argument("--frontier", action="store_true", help="only the frontier of reward against KL")
    options = parser.parse_args(arguments)
    payload = read_saved(options.file, _KIND, "tables", "budgets", "learning_rates")
    if options.frontier:
        if payload.get("frontier") is None:
            sys.exit(
                f"{options.file} has no frontier: it is of an earlier version, or compare.frontier_prompts was 0. The "
                "command that made it adds one to its runs, with compare.frontier_prompts at 1 or more."
            )
        print(frontier_markdown(payload["frontier"]), end="")
    elif options.budget is None:
        print(document(payload), end="")
    else:
        print(markdown(payload["tables"][options.budget], options.budget, Budgets(**payload["budgets"])), end="")


if __name__ == "__main__":
    main()

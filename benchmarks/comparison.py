"""The tables of a comparison that `grade compare` has made, as Markdown.

    python -m benchmarks.comparison runs/compare-imdb_small/comparison.json
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import List

from grade.comparison_text import document
from grade.errors import GradeError, read_json


def main(arguments: List[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="a comparison.json")
    try:
        fix = "Name a comparison.json that `grade compare` has written."
        payload = read_json(parser.parse_args(arguments).file, fix, "tables", "budgets", "learning_rates")
    except GradeError as error:
        sys.exit(str(error))
    print(document(payload), end="")


if __name__ == "__main__":
    main()

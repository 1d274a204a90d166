"""The tables of a comparison that `grade compare` has made, as Markdown.

    python -m benchmarks.comparison runs/compare-imdb_small/comparison.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import List

from grade.comparison_text import document


def main(arguments: List[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="a comparison.json")
    print(document(json.loads(parser.parse_args(arguments).file.read_text(encoding="utf-8"))), end="")


if __name__ == "__main__":
    main()

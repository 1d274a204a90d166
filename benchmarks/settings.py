"""Settings as a Markdown table, from the dataclasses that declare them.

python -m benchmarks.settings method.ppo                         # a section
python -m benchmarks.settings method.estimator method.max_hops   # single ones
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass

from docstring_parser import parse_from_object

from benchmarks.saved import new_parser
from grade.config import Config, get_setting
from grade.tables import Column, Table


def main(arguments: list[str] | None = None) -> None:
    parser = new_parser(__doc__)
    parser.add_argument("names", nargs="+", metavar="NAME", help="a section or a setting")
    rows = [
        [f"`{setting}`", f"`{default}`", meaning]
        for name in parser.parse_args(arguments).names
        for setting, default, meaning in settings(name)
    ]
    print(Table("", [Column("setting"), Column("default"), Column("meaning")], rows).markdown())


def settings(name: str) -> Iterator[tuple[str, str, str]]:
    """(dotted name, default as in YAML, meaning) of a setting, or of each of a section; not of sections inside it.

    Raises:
        SystemExit: there is no such name.
    """
    try:
        found = get_setting(Config(), name)
    except AttributeError:
        sys.exit(f"There is no setting {name}: see `grade train --help`.")
    if is_dataclass(found):
        for field in fields(found):
            if not is_dataclass(getattr(found, field.name)):
                yield from settings(f"{name}.{field.name}")
        return
    section, _, own = name.rpartition(".")
    owner = get_setting(Config(), section) if section else Config()
    documented = {param.arg_name: param.description or "" for param in parse_from_object(type(owner)).params}
    yield name, found if isinstance(found, str) else json.dumps(found), " ".join(documented[own].split())


if __name__ == "__main__":
    main()

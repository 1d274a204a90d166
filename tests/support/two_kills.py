"""A folder that is replaced twice, by processes that are killed at any two moments: a program for tests/test_files.py.

It is one of its own because it forks some eight hundred times, and a process with torch in it takes ten times as long
for that as one without.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from killing import killed

from grade.files import latest, replaced_folder


def write(folder: Path, version: str) -> None:
    with replaced_folder(folder) as fresh:
        (fresh / "a").write_text(version)
        (fresh / "b").write_text(version)


def version_of(folder: Path) -> str:
    """What a folder holds, which must be whole."""
    found = latest(folder)
    versions = {(found / name).read_text() for name in ("a", "b")}
    assert len(versions) == 1, versions
    return versions.pop()


def main(place: Path) -> None:
    """A first kill while version 2 is written over version 1, a second one while version 3 is."""
    os.fsync = lambda descriptor: None  # slow, and a killed process loses nothing without it
    number = first = 0
    while True:
        first += 1
        second = 0
        while True:
            second += 1
            number += 1
            folder = place / str(number) / "last"
            write(folder, "1")
            first_came = killed(lambda f=folder: write(f, "2"), folder.parent, first)
            second_came = killed(lambda f=folder: write(f, "3"), folder.parent, second)
            version = version_of(folder)
            assert version in ({"1", "2", "3"} if second_came else {"3"}), (first, second)
            write(folder, "4")
            assert version_of(folder) == "4"
            if not second_came:
                break
        if not first_came:
            break
    assert first > 5 and number > 30  # there were moments
    print("moments:", first - 1)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""Finds and reads the files or the hub's data set that task.dataset names; what the columns mean is the tasks' matter.

What the data source may be, tried in this order:

1. a folder written by `datasets.save_to_disk`, whose parts are called `train`, `test` and so on;
2. a folder with `train.*` and `test.*` in one of parquet, csv, json or jsonl (shards such as
   `train-00000-of-00002.parquet` too); also txt, a text a line, and a file by itself, where a task takes them;
3. otherwise a dataset on the hub.
"""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from grade.errors import GradeError, reason_of
from grade.hub import without_waiting
from grade.hub_names import GIVEN, looks_local

_READERS = {"parquet": "parquet", "csv": "csv", "json": "json", "jsonl": "json", "txt": "text"}
_Taken = TypeVar("_Taken")


class Parts(NamedTuple):
    """Which parts of a data set a task reads, and from what.

    Attributes:
        required: parts that must be there; the first one is the training data.
        optional: parts that are read where they are there.
        bare: take a file by itself, text files and a single saved data set too, as the first part.
    """

    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    bare: bool = False

    @property
    def kinds(self) -> list[str]:
        return [suffix for suffix in _READERS if self.bare or suffix != "txt"]

    def __str__(self) -> str:
        files = " and ".join(f"{part}.*" for part in self.required)
        start = "a file or a folder" if self.bare else "a folder"
        *most, last = self.kinds
        return f"{start} with {files} ({', '.join(most)} or {last}) or one written by save_to_disk"


def read_data(name: str, parts: Parts, take: Callable[[dict[str, list]], _Taken]) -> _Taken:
    """What `take` makes of the data set's parts, each a list of one or more `datasets.Dataset`.

    The parts may be gone when this has returned: `take` must copy what it keeps.

    Raises:
        GradeError: the data is missing, unreachable or unreadable.
    """
    if name.startswith(GIVEN):
        raise GradeError(
            f"task.dataset is {name}: those were given as objects in Python, and no setting tells where they are. Go "
            f"on in that program, or name {parts}, or a hub dataset."
        )
    path = Path(name).expanduser()
    if not looks_local(name) and not (parts.bare and path.is_file()):
        return take(_of_hub(name, parts))
    if path.is_dir() or (parts.bare and path.is_file()):
        return _of_disk(path, parts, take)
    if path.exists():
        raise GradeError(f"task.dataset is {name}, a file: name the folder that holds it ({parts}).")
    raise GradeError(f"task.dataset is {name}, and there is no such folder. Name {parts}, or a hub dataset.")


def where(name: str, part: str) -> str:
    """A part of a data set, as the start of a sentence."""
    return f"The {part} data of task.dataset={name}"


def filled(name: str, part: str, datasets: list) -> list:
    """The data sets of a part that have rows.

    Raises:
        GradeError: none has any.
    """
    found = [rows for rows in datasets if len(rows)]
    if not found:
        raise _no_rows(name, part)
    return found


def _no_rows(name: str, part: str) -> GradeError:
    return GradeError(f"{where(name, part)} is empty: it has no rows. Name data with rows.")


def _of_disk(path: Path, parts: Parts, take: Callable[[dict[str, list]], _Taken]) -> _Taken:
    import datasets

    if (path / "dataset_dict.json").exists():
        for part in parts.required:  # `datasets` saves no rows as no files, and then cannot read them
            if (path / part).is_dir() and not any((path / part).glob("*.arrow")):
                raise _no_rows(str(path), part)
        with _reading(path):
            data = datasets.load_from_disk(str(path))
        return take(_wanted(str(path), {part: [data[part]] for part in data}, parts))
    if (path / "dataset_info.json").exists() and (path / "state.json").exists():
        if not parts.bare:
            raise GradeError(
                f"task.dataset is {path}, a single saved dataset: save a DatasetDict with the parts train and test."
            )
        if not any(path.glob("*.arrow")):
            raise _no_rows(str(path), parts.required[0])
        with _reading(path):
            return take({parts.required[0]: [datasets.load_from_disk(str(path))]})
    reader, files = _data_files(path, parts)
    # The reader's cache lies in a folder of its own and goes with it: the data folder may be read-only, and
    # no second copy of somebody's data stays behind.
    with tempfile.TemporaryDirectory(prefix="grade-", ignore_cleanup_errors=True) as cache:
        with _quiet(datasets):
            data = {part: [_read_file(reader, part, file, cache, path) for file in files[part]] for part in files}
        return take(data)


def _wanted(name: str, data: dict[str, list], parts: Parts) -> dict[str, list]:
    """The parts that the task reads, after a look whether all are there."""
    missing = [part for part in parts.required if part not in data]
    if missing:
        raise GradeError(
            f"The data of task.dataset={name} has no part called {missing[0]} (it has "
            f"{', '.join(data) or 'none'}): {' and '.join(parts.required)} "
            f"{'are' if len(parts.required) > 1 else 'is'} needed."
        )
    return {part: data[part] for part in (*parts.required, *parts.optional) if part in data}


def _read_file(reader: str, part: str, file: str, cache: str, path: Path) -> Any:
    """One file as a dataset. Read together, files would have to have the same columns, of which two are needed."""
    import datasets

    with _reading(path):
        if _holds_nothing(reader, file):
            blank = "holds blank lines alone" if Path(file).stat().st_size else "has 0 bytes"
            raise GradeError(f"task.dataset={path}: {file} {blank}. Write its rows again, or name other data.")
        if reader == "parquet" and not _parquet_rows(file):  # which `datasets` takes for a broken file
            return datasets.Dataset.from_dict({})
        try:
            return datasets.load_dataset(reader, data_files={part: [file]}, split=part, cache_dir=cache)
        except Exception as error:
            # Only the wording tells a file without rows from a broken one; unrecognised, the reason is still shown.
            if re.search(r'"(\w+)" corresponds to no data', str(error)):
                return datasets.Dataset.from_dict({})
            raise


def _holds_nothing(reader: str, file: str) -> bool:
    """Whether a file has no bytes or, if it is one of text, none but those of blank lines."""
    with open(file, "rb") as opened:
        return not opened.read(1) if reader == "parquet" else not any(line.strip() for line in opened)


def _parquet_rows(file: str) -> int:
    from pyarrow.parquet import read_metadata

    return read_metadata(file).num_rows


def _data_files(path: Path, parts: Parts) -> tuple[str, dict[str, list[str]]]:
    """The reader (as `datasets` calls it) and the files of the parts in a folder, or the one file."""
    if path.is_file():
        suffix = path.suffix.removeprefix(".")
        if suffix not in parts.kinds:
            raise GradeError(
                f"task.dataset is {path}, a file that is none of {', '.join(parts.kinds)}: convert it to one of them."
            )
        return _READERS[suffix], {parts.required[0]: [str(path)]}
    found: dict[str, dict[str, list[str]]] = {}
    names = "|".join((*parts.required, *parts.optional))
    for file in sorted(path.iterdir()):
        match = re.fullmatch(rf"({names})(?:-.*)?\.(\w+)", file.name)
        if match and match[2] in parts.kinds:
            found.setdefault(match[2], {}).setdefault(match[1], []).append(str(file))
    complete = {suffix: files for suffix, files in found.items() if all(part in files for part in parts.required)}
    if len(complete) != 1:
        listed = ", ".join(sorted(file.name for file in path.iterdir())[:10]) or "nothing"
        which = "both parts" if len(parts.required) == 2 else " and ".join(parts.required)
        problem = f"has {which} as {' and as '.join(complete)}" if complete else f"holds {listed}"
        *most, last = parts.kinds
        needed = " and one ".join(f"{part}.*" for part in parts.required)
        raise GradeError(
            f"task.dataset is {path}, which {problem}: it needs one {needed}"
            f"{' of the same kind' if len(parts.required) > 1 else ''} ({', '.join(most)} or {last})."
        )
    suffix, files = complete.popitem()
    return _READERS[suffix], files


def _of_hub(name: str, parts: Parts) -> dict[str, list]:
    import datasets

    try:
        with without_waiting():
            data = datasets.load_dataset(name)
    except datasets.exceptions.DatasetNotFoundError as error:
        raise GradeError(
            f"task.dataset is {name}: there is no such folder here, and the hub shows no such dataset "
            f"({reason_of(error)}). Correct the name, or name {parts}."
        ) from error
    except Exception as error:
        if _is_connection_error(error):
            raise GradeError(
                f"task.dataset is {name}, a dataset on the hub, and the hub cannot be reached. To "
                f"work without it, set task.dataset to {parts}."
            ) from error
        raise GradeError(
            f"task.dataset is {name}, and the hub's dataset cannot be loaded ({_innermost(error)}). "
            f"Save it yourself and set task.dataset to {parts}."
        ) from error
    return _wanted(name, {part: [data[part]] for part in data}, parts)


def _is_connection_error(error: BaseException | None) -> bool:
    """Whether a network failure is at the root. Told by class names: the hub's HTTP library has changed
    before."""
    while error is not None:
        names = {cls.__name__ for cls in type(error).__mro__}
        if names & {"ConnectionError", "TimeoutError", "TransportError", "OfflineModeIsEnabled"}:
            return True
        error = error.__cause__ or error.__context__
    return False


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Say which data could not be read, where a reader only says what broke inside it."""
    try:
        yield
    except GradeError:
        raise
    except Exception as error:
        raise GradeError(f"task.dataset is {path}, and its files cannot be read: {_innermost(error)}") from error


def _innermost(error: BaseException) -> str:
    """The reason that the innermost cause of an error gives: readers wrap it in words of their own."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {reason_of(error)}"


@contextlib.contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    """No progress bars for files that are read in a second or two."""
    shown = datasets.utils.are_progress_bars_disabled() is False
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()

"""Labelled reviews (IMDB and files like it) as a task: finding the data, reading it, checking it.

What the data source may be, tried in this order:

1. a folder written by `datasets.save_to_disk` that holds `train` and `test`;
2. a folder with `train.*` and `test.*` in one of parquet, csv, json or jsonl (shards such as
   `train-00000-of-00002.parquet` too);
3. otherwise a dataset on the hub.
"""

from __future__ import annotations

import contextlib
import re
import tempfile
from pathlib import Path

from grade.config import GradeError, TaskConfig
from grade.tasks import Example, Task, clean, cut_splits

_PARTS = ("train", "test")
_READERS = {"parquet": "parquet", "csv": "csv", "json": "json", "jsonl": "json"}
_LOCAL_FILES = "a folder with train.* and test.* (parquet, csv, json or jsonl) or one written by save_to_disk"


def load(settings: TaskConfig) -> Task:
    """Read the reviews that `settings.dataset` names and cut them into splits.

    Raises:
        GradeError: the data is missing, unreachable, empty, or lacks a column, a class or enough rows.
    """
    name = settings.dataset
    path = Path(name).expanduser()
    if path.is_dir():
        files = _load_folder(path, settings)
    elif path.exists():
        raise GradeError(f"task.dataset is {name}, a file: name the folder that holds it ({_LOCAL_FILES}).")
    elif name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise GradeError(
            f"task.dataset is {name}, and there is no such folder. Name {_LOCAL_FILES}, or a hub dataset."
        )
    else:
        files = _load_hub(name, settings)
    return cut_splits(files["train"], files["test"], settings, source=name)


def _load_folder(path: Path, settings: TaskConfig) -> dict[str, list[Example]]:
    import datasets

    if (path / "dataset_dict.json").exists():
        for part in _PARTS:  # `datasets` saves no rows as no files, and then cannot read them
            if (path / part).is_dir() and not any((path / part).glob("*.arrow")):
                raise GradeError(f"The {part} data of task.dataset={path} is empty: it has no rows.")
        with _reading(path):
            data = datasets.load_from_disk(str(path))
        return _examples(data, settings)
    if (path / "dataset_info.json").exists() and (path / "state.json").exists():
        raise GradeError(
            f"task.dataset is {path}, a single saved dataset: save a DatasetDict with the parts train "
            "and test."
        )
    reader, files = _data_files(path)
    # The reader's cache lies in a folder of its own and goes with it: the data folder may be read-only, and
    # no second copy of somebody's data stays behind.
    with tempfile.TemporaryDirectory(prefix="grade-", ignore_cleanup_errors=True) as cache:
        with _reading(path), _quiet(datasets):
            data = datasets.load_dataset(reader, data_files=files, cache_dir=cache)
        return _examples(data, settings)


def _data_files(path: Path) -> tuple[str, dict[str, list[str]]]:
    """The reader (as `datasets` calls it) and the files of both parts in a folder."""
    found: dict[str, dict[str, list[str]]] = {}
    for file in sorted(path.iterdir()):
        match = re.fullmatch(r"(train|test)(?:-.*)?\.(\w+)", file.name)
        if match and match[2] in _READERS:
            found.setdefault(match[2], {}).setdefault(match[1], []).append(str(file))
    complete = {suffix: files for suffix, files in found.items() if len(files) == len(_PARTS)}
    if len(complete) != 1:
        names = ", ".join(sorted(file.name for file in path.iterdir())[:10]) or "nothing"
        problem = f"has both parts as {' and as '.join(complete)}" if complete else f"holds {names}"
        raise GradeError(
            f"task.dataset is {path}, which {problem}: it needs one train.* and one test.* of the same kind "
            "(parquet, csv, json or jsonl)."
        )
    suffix, files = complete.popitem()
    return _READERS[suffix], files


def _load_hub(name: str, settings: TaskConfig) -> dict[str, list[Example]]:
    import datasets

    try:
        data = datasets.load_dataset(name)
    except datasets.exceptions.DatasetNotFoundError as error:
        raise GradeError(
            f"task.dataset is {name}: there is no such folder here, and the hub shows no such dataset "
            f"({error}). Correct the name, or name {_LOCAL_FILES}."
        ) from error
    except Exception as error:
        if _is_connection_error(error):
            raise GradeError(
                f"task.dataset is {name}, a dataset on the hub, and the hub cannot be reached. To "
                f"work without it, set task.dataset to {_LOCAL_FILES}."
            ) from error
        raise GradeError(
            f"task.dataset is {name}, and the hub's dataset cannot be loaded ({_one_line(error)}). "
            f"Save it yourself and set task.dataset to {_LOCAL_FILES}."
        ) from error
    return _examples(data, settings)


def _is_connection_error(error: BaseException | None) -> bool:
    """Whether a network failure is at the root. Told by class names: the hub's HTTP library has changed
    before."""
    while error is not None:
        names = {cls.__name__ for cls in type(error).__mro__}
        if names & {"ConnectionError", "TimeoutError", "TransportError", "OfflineModeIsEnabled"}:
            return True
        error = error.__cause__ or error.__context__
    return False


def _examples(data, settings: TaskConfig) -> dict[str, list[Example]]:
    """The examples of both parts, after every check that does not depend on the splits' sizes."""
    missing = [part for part in _PARTS if part not in data]
    if missing:
        raise GradeError(
            f"The data of task.dataset={settings.dataset} has no part called {missing[0]} (it has "
            f"{', '.join(data) or 'none'}): train and test are needed."
        )
    return {part: _read_part(data[part], part, settings) for part in _PARTS}


def _read_part(rows, part: str, settings: TaskConfig) -> list[Example]:
    where = f"The {part} data of task.dataset={settings.dataset}"
    if len(rows) == 0:
        raise GradeError(f"{where} is empty: it has no rows.")
    for setting in ("text_column", "label_column"):
        column = getattr(settings, setting)
        if column not in rows.column_names:
            raise GradeError(
                f"{where} has no column {column!r}: set task.{setting} to one of "
                f"{', '.join(rows.column_names)}."
            )
    columns = rows.select_columns(list({settings.text_column, settings.label_column})).with_format(None)[:]
    examples = []
    texts, labels = columns[settings.text_column], columns[settings.label_column]
    for row, (text, label) in enumerate(zip(texts, labels, strict=True)):
        if text is not None and not isinstance(text, str):
            raise GradeError(
                f"{where} has {type(text).__name__} values in column {settings.text_column!r}: "
                f"task.text_column must name a column of strings ({', '.join(rows.column_names)})."
            )
        if label is None:
            raise GradeError(
                f"{where} has no label in row {row}, column {settings.label_column!r}: remove such rows."
            )
        cleaned = clean(text or "")
        if cleaned:  # there is nothing to read or to continue in an empty review
            examples.append(Example(f"{part}/{row}", cleaned, int(str(label) == settings.positive_label)))
    if not examples:
        raise GradeError(
            f"{where} is empty: no row has text in column {settings.text_column!r} (task.text_column)."
        )
    if len({example.label for example in examples}) < 2:
        values = sorted({str(label) for label in labels})
        shown = ", ".join(values[:10]) + (", ..." if len(values) > 10 else "")
        problem = "only positive rows" if examples[0].label else "no positive row"
        raise GradeError(
            f"{where} has {problem} by task.positive_label={settings.positive_label!r}: column "
            f"{settings.label_column!r} holds {shown}. Both classes are needed: correct "
            "task.positive_label or task.label_column, or use data with both."
        )
    return examples


@contextlib.contextmanager
def _reading(path: Path):
    """Say which data could not be read, where a reader only says what broke inside it."""
    try:
        yield
    except Exception as error:
        # Only the wording tells files without rows from broken ones; unrecognised, the reason is still shown.
        empty = re.search(r'"(\w+)" corresponds to no data', str(error))
        if empty:
            message = f"The {empty[1]} data of task.dataset={path} is empty: it has no rows."
            raise GradeError(message) from error
        raise GradeError(
            f"task.dataset is {path}, and its files cannot be read: {_one_line(error)}"
        ) from error


def _one_line(error: BaseException) -> str:
    """The innermost cause of an error (readers wrap it in words of their own), first line only."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


@contextlib.contextmanager
def _quiet(datasets):
    """No progress bars for files that are read in a second or two."""
    shown = datasets.utils.are_progress_bars_disabled() is False
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()

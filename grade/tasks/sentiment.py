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
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from grade.config import TaskConfig
from grade.errors import GradeError, reason_of
from grade.hub import without_waiting
from grade.hub_names import looks_local
from grade.tasks.base import Example, Labels
from grade.tasks.texts import TextTask, clean, cut_splits

_PARTS = ("train", "test")
_READERS = {"parquet": "parquet", "csv": "csv", "json": "json", "jsonl": "json"}
_UNLABELLED = "-1"  # as the hub's data sets mark rows without a label
_LOCAL_FILES = "a folder with train.* and test.* (parquet, csv, json or jsonl) or one written by save_to_disk"


class Labelled(NamedTuple):
    """The examples of train and test, and what their labels mean."""

    parts: dict[str, list[Example]]
    labels: Labels


def load(settings: TaskConfig) -> TextTask:
    """Read the reviews that `settings.dataset` names and cut them into splits.

    Raises:
        GradeError: the data is missing, unreachable, empty, or lacks a column, a class or enough rows.
    """
    name = settings.dataset
    path = Path(name).expanduser()
    if not looks_local(name):
        files = _load_hub(name, settings)
    elif path.is_dir():
        files = _load_folder(path, settings)
    elif path.exists():
        raise GradeError(f"task.dataset is {name}, a file: name the folder that holds it ({_LOCAL_FILES}).")
    else:
        raise GradeError(
            f"task.dataset is {name}, and there is no such folder. Name {_LOCAL_FILES}, or a hub dataset."
        )
    return cut_splits(files.parts["train"], files.parts["test"], settings, source=name, labels=files.labels)


def _load_folder(path: Path, settings: TaskConfig) -> Labelled:
    import datasets

    if (path / "dataset_dict.json").exists():
        for part in _PARTS:  # `datasets` saves no rows as no files, and then cannot read them
            if (path / part).is_dir() and not any((path / part).glob("*.arrow")):
                raise GradeError(f"The {part} data of task.dataset={path} is empty: it has no rows.")
        with _reading(path):
            data = datasets.load_from_disk(str(path))
        return _examples({part: [data[part]] for part in data}, settings)
    if (path / "dataset_info.json").exists() and (path / "state.json").exists():
        raise GradeError(
            f"task.dataset is {path}, a single saved dataset: save a DatasetDict with the parts train "
            "and test."
        )
    reader, files = _data_files(path)
    # The reader's cache lies in a folder of its own and goes with it: the data folder may be read-only, and
    # no second copy of somebody's data stays behind.
    with tempfile.TemporaryDirectory(prefix="grade-", ignore_cleanup_errors=True) as cache:
        with _quiet(datasets):
            data = {part: [_read_file(reader, part, file, cache, path) for file in files[part]] for part in _PARTS}
        return _examples(data, settings)


def _read_file(reader: str, part: str, file: str, cache: str, path: Path) -> Any:
    """One file as a dataset. Read together, files would have to have the same columns, of which two are needed."""
    import datasets

    with _reading(path):
        try:
            return datasets.load_dataset(reader, data_files={part: [file]}, split=part, cache_dir=cache)
        except Exception as error:
            # Only the wording tells a file without rows from a broken one; unrecognised, the reason is still shown.
            if re.search(r'"(\w+)" corresponds to no data', str(error)):
                return datasets.Dataset.from_dict({})
            raise


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


def _load_hub(name: str, settings: TaskConfig) -> Labelled:
    import datasets

    try:
        with without_waiting():
            data = datasets.load_dataset(name)
    except datasets.exceptions.DatasetNotFoundError as error:
        raise GradeError(
            f"task.dataset is {name}: there is no such folder here, and the hub shows no such dataset "
            f"({reason_of(error)}). Correct the name, or name {_LOCAL_FILES}."
        ) from error
    except Exception as error:
        if _is_connection_error(error):
            raise GradeError(
                f"task.dataset is {name}, a dataset on the hub, and the hub cannot be reached. To "
                f"work without it, set task.dataset to {_LOCAL_FILES}."
            ) from error
        raise GradeError(
            f"task.dataset is {name}, and the hub's dataset cannot be loaded ({_innermost(error)}). "
            f"Save it yourself and set task.dataset to {_LOCAL_FILES}."
        ) from error
    return _examples({part: [data[part]] for part in data}, settings)


def _is_connection_error(error: BaseException | None) -> bool:
    """Whether a network failure is at the root. Told by class names: the hub's HTTP library has changed
    before."""
    while error is not None:
        names = {cls.__name__ for cls in type(error).__mro__}
        if names & {"ConnectionError", "TimeoutError", "TransportError", "OfflineModeIsEnabled"}:
            return True
        error = error.__cause__ or error.__context__
    return False


def _examples(data: dict[str, list], settings: TaskConfig) -> Labelled:
    """The examples of both parts, each of one or more datasets, after every check that does not depend on the splits'
    sizes."""
    missing = [part for part in _PARTS if part not in data]
    if missing:
        raise GradeError(
            f"The data of task.dataset={settings.dataset} has no part called {missing[0]} (it has "
            f"{', '.join(data) or 'none'}): train and test are needed."
        )
    columns = {part: _columns(data[part], part, settings) for part in _PARTS}
    negative = _negative_label(settings, {label for _, labels in columns.values() for label in labels})
    left_out: Counter = Counter()
    examples = {}
    for part, (texts, labels) in columns.items():
        classes = {settings.positive_label: 1, negative: 0}
        left_out.update(label for label in labels if label not in classes)
        empty = sum(not text and label in classes for text, label in zip(texts, labels, strict=True))
        left_out.update({"": empty} if empty else {})
        examples[part] = [
            Example(f"{part}/{row}", text, classes[label])
            for row, (text, label) in enumerate(zip(texts, labels, strict=True))
            if text and label in classes  # there is nothing to read or to continue in an empty review
        ]
        _check_part(examples[part], labels, _where(part, settings), settings)
    return Labelled(examples, Labels(settings.label_column, settings.positive_label, negative, dict(left_out)))


def _where(part: str, settings: TaskConfig) -> str:
    return f"The {part} data of task.dataset={settings.dataset}"


def _columns(datasets: list, part: str, settings: TaskConfig) -> tuple[list[str], list[str]]:
    """Cleaned texts and labels, as text, of all rows."""
    where = _where(part, settings)
    filled = [rows for rows in datasets if len(rows)]
    if not filled:
        raise GradeError(f"{where} is empty: it has no rows.")
    texts: list[str] = []
    labels: list[str] = []
    for rows in filled:
        for setting in ("text_column", "label_column"):
            column = getattr(settings, setting)
            if column not in rows.column_names:
                raise GradeError(
                    f"{where} has no column {column!r}: set task.{setting} to one of "
                    f"{', '.join(rows.column_names)}."
                )
        columns = rows.select_columns(list({settings.text_column, settings.label_column})).with_format(None)[:]
        for text, label in zip(columns[settings.text_column], columns[settings.label_column], strict=True):
            if text is not None and not isinstance(text, str):
                raise GradeError(
                    f"{where} has {type(text).__name__} values in column {settings.text_column!r}: "
                    f"task.text_column must name a column of strings ({', '.join(rows.column_names)})."
                )
            if label is None:
                raise GradeError(
                    f"{where} has no label in row {len(labels)}, column {settings.label_column!r}: remove such rows."
                )
            texts.append(clean(text or ""))
            labels.append(str(label))
    return texts, labels


def _negative_label(settings: TaskConfig, values: set[str]) -> str | None:
    """The label that means 'negative': task.negative_label, or else the one besides the positive one (and besides -1,
    which means unlabelled where there are two others). None where there is no second one, or no positive one.

    Raises:
        GradeError: it is not clear which one is meant.
    """
    positive, negative = settings.positive_label, settings.negative_label
    if negative is not None:
        if negative == positive or negative not in values:
            raise GradeError(
                f"task.negative_label is {negative!r}: column {settings.label_column!r} of task.dataset="
                f"{settings.dataset} holds {_shown(values)}, and task.positive_label is {positive!r}. Name another of "
                "them."
            )
        return negative
    others = values - {positive}
    if len(others) > 1:
        others -= {_UNLABELLED}
    if positive in values and len(others) > 1:
        raise GradeError(
            f"Column {settings.label_column!r} of task.dataset={settings.dataset} holds {_shown(values)}: besides "
            f"task.positive_label={positive!r} there is more than one. Set task.negative_label to the one that means "
            "'negative'; rows with any other are left out and counted."
        )
    return others.pop() if len(others) == 1 else None


def _shown(values: Iterable[str]) -> str:
    ordered = sorted(set(values))
    return ", ".join(ordered[:10]) + (", ..." if len(ordered) > 10 else "")


def _check_part(examples: list[Example], labels: list[str], where: str, settings: TaskConfig) -> None:
    """Whether a part has both classes."""
    classes = {example.label for example in examples}
    if len(classes) == 2:
        return
    if not examples and settings.positive_label in labels:
        raise GradeError(
            f"{where} is empty: no row has text in column {settings.text_column!r} (task.text_column)."
        )
    problem = "only positive rows" if 1 in classes else "no positive row"
    raise GradeError(
        f"{where} has {problem} by task.positive_label={settings.positive_label!r}: column "
        f"{settings.label_column!r} holds {_shown(labels)}. Both classes are needed: correct "
        "task.positive_label or task.label_column, or use data with both."
    )


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Say which data could not be read, where a reader only says what broke inside it."""
    try:
        yield
    except Exception as error:
        raise GradeError(
            f"task.dataset is {path}, and its files cannot be read: {_innermost(error)}"
        ) from error


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

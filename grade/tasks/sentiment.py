"""Labelled reviews (IMDB and files like it) as a task: which columns are read, and what their labels mean."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from grade.config import TaskConfig
from grade.errors import GradeError
from grade.tasks.base import Example, Labels
from grade.tasks.reading import Parts, filled, read_data, where
from grade.tasks.texts import TextTask, clean, cut_splits

PARTS = Parts(("train", "test"))
_UNLABELLED = "-1"  # as the hub's data sets mark rows without a label


class Labelled(NamedTuple):
    """The examples of train and test, and what their labels mean."""

    parts: dict[str, list[Example]]
    labels: Labels | None = None


def load(settings: TaskConfig, *, labels: bool = True) -> TextTask:
    """Read the reviews that `settings.dataset` names and cut them into splits.

    Args:
        labels: a head is trained on them; false: they are taken with their labels if all is well with these, and
            without otherwise.

    Raises:
        GradeError: the data is missing, unreachable, empty, or lacks a column, a class or enough rows.
    """
    read = _examples if labels else _examples_if_labelled
    files = read_data(settings.dataset, PARTS, lambda data: read(data, settings))
    return cut_splits(
        files.parts["train"],
        files.parts["test"],
        settings,
        source=settings.dataset,
        labels=files.labels,
        trains_head=labels,
    )


def _examples_if_labelled(data: dict[str, list], settings: TaskConfig) -> Labelled:
    try:
        return _examples(data, settings)
    except GradeError:  # what is wrong with the texts is found again here
        texts = {part: _columns(data[part], part, settings, ("text_column",))[0] for part in PARTS.required}
    examples = {
        part: [Example(f"{part}/{row}", text, None) for row, text in enumerate(rows) if text]
        for part, rows in texts.items()
    }
    for part, found in examples.items():
        _check_texts(found, where(settings.dataset, part), settings)
    return Labelled(examples)


def _examples(data: dict[str, list], settings: TaskConfig) -> Labelled:
    """The examples of both parts, each of one or more datasets, after every check that does not depend on the splits'
    sizes."""
    columns = {part: _columns(data[part], part, settings) for part in PARTS.required}
    if settings.label_type == "numbers":
        return _with_numbers(columns, settings)
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
        _check_part(examples[part], labels, where(settings.dataset, part), settings)
    return Labelled(examples, Labels(settings.label_column, settings.positive_label, negative, dict(left_out)))


def _with_numbers(columns: dict[str, tuple[list[str], list[str]]], settings: TaskConfig) -> Labelled:
    """Texts with numbers to learn."""
    examples: dict[str, list[Example]] = {}
    for part, (texts, labels) in columns.items():
        for row, label in enumerate(labels):
            try:
                finite = math.isfinite(float(label))
            except ValueError:
                finite = False
            if not finite:
                raise GradeError(
                    f"{where(settings.dataset, part)} has the label {label!r} in row {row}, column "
                    f"{settings.label_column!r}: task.label_type=numbers needs finite numbers. Correct the rows, or "
                    "set task.label_type to classes."
                )
        examples[part] = [
            Example(f"{part}/{row}", text, float(label))
            for row, (text, label) in enumerate(zip(texts, labels, strict=True))
            if text
        ]
        _check_texts(examples[part], where(settings.dataset, part), settings)
    return Labelled(examples)


def _check_texts(examples: list[Example], where: str, settings: TaskConfig) -> None:
    if not examples:
        raise GradeError(f"{where} is empty: no row has text in column {settings.text_column!r} (task.text_column).")


def _columns(
    datasets: list, part: str, settings: TaskConfig, wanted: tuple[str, ...] = ("text_column", "label_column")
) -> tuple[list[str], list[str]]:
    """Cleaned texts and labels, as text, of all rows; no labels unless they are wanted."""
    place = where(settings.dataset, part)
    texts: list[str] = []
    labels: list[str] = []
    for rows in filled(settings.dataset, part, datasets):
        for setting in wanted:
            column = getattr(settings, setting)
            if column not in rows.column_names:
                raise GradeError(
                    f"{place} has no column {column!r}: set task.{setting} to one of {', '.join(rows.column_names)}."
                )
        columns = rows.select_columns(list({getattr(settings, name) for name in wanted})).with_format(None)[:]
        for text in columns[settings.text_column]:
            if text is not None and not isinstance(text, str):
                raise GradeError(
                    f"{place} has {type(text).__name__} values in column {settings.text_column!r}: "
                    f"task.text_column must name a column of strings ({', '.join(rows.column_names)})."
                )
            texts.append(clean(text or ""))
        for label in columns[settings.label_column] if "label_column" in wanted else ():
            if label is None:
                raise GradeError(
                    f"{place} has no label in row {len(labels)}, column {settings.label_column!r}: remove such rows."
                )
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
    if settings.positive_label in labels:
        _check_texts(examples, where, settings)
    problem = "only positive rows" if 1 in classes else "no positive row"
    raise GradeError(
        f"{where} has {problem} by task.positive_label={settings.positive_label!r}: column "
        f"{settings.label_column!r} holds {_shown(labels)}. Both classes are needed: correct "
        "task.positive_label or task.label_column, or use data with both."
    )

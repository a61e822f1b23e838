"""Reads local files of texts and labels as the data of a task. No row is dropped or guessed.

Error messages about a row have its number; in a CSV the column names are row 1.
"""

from __future__ import annotations

import csv
import io
import json
import math
import random
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets  # type: ignore[import-untyped]
from glue_tasks import Data, Task, dataset_of

MAX_HELD_OUT = 500
MAX_SHOWN = 10  # number of values shown in a message


@dataclass(frozen=True)
class Row:
    """An example and its position in a file."""

    texts: tuple[str, ...]
    label: str
    path: Path
    number: int

    @property
    def where(self) -> str:
        """The position, for messages."""
        return f"row {self.number} of '{self.path}'"


def load_files(
    train: Path,
    dev: Path | None = None,
    test: Path | None = None,
    *,
    texts: Sequence[str] = (),
    label: str = "label",
    is_regression: bool = False,
    encoding: str = "utf-8",
) -> Data:
    """Return the data of local files.

    A ``.csv`` starts with a line of column names, a ``.jsonl`` has one object per line. Any other file
    has a label, a space or tab, and a text on each line. Without ``dev``, a tenth of the training examples, at
    most 500, is held out to choose the step; with classes, the same share of each class.

    Args:
        train: file to train on; its labels are the classes.
        dev: file that chooses the step.
        test: file that is scored at the end.
        texts: the column of the text, or two columns; by default all columns except the label's,
            ``id`` and ``idx``.
        label: the column of the label.
        is_regression: whether the labels are numbers to predict.
        encoding: encoding of the files.

    Raises:
        ValueError: a file does not have its format, or a label cannot be learnt.
        OSError: a file cannot be read.
    """

    def read(path: Path) -> list[Row]:
        rows = _rows(path, texts, label, encoding)
        if is_regression:
            _check_numbers(rows)
        return rows

    rows = read(train)
    # The classes are found before examples are held out, so none is missing.
    classes = [] if is_regression else _classes(rows, train)
    scored: dict[str, list[Row]] = {}
    if dev is not None:
        scored["dev"] = read(dev)
    else:
        rows, scored["dev"] = _split(rows, train, by_class=not is_regression)
    if test is not None:
        scored["test"] = read(test)

    def made(rows: Sequence[Row]) -> datasets.Dataset:
        labels: Sequence[float] = (
            [float(row.label) for row in rows]
            if is_regression
            else _class_numbers(rows, classes, train)
        )
        return dataset_of(list(zip(*(row.texts for row in rows), strict=True)), labels)

    task = Task(
        name=train.name,
        texts=tuple(texts),
        scores=("pearson", "spearman") if is_regression else ("accuracy",),
        dev={},
        epochs=10,
        n_labels=max(1, len(classes)),
    )
    return Data(
        task=task,
        train=made(rows),
        scored={name: made(own) for name, own in scored.items()},
        labels=classes,
    )


def regression_hint(labels: Sequence[str]) -> str:
    """Return a hint to use --regression if all class names are numbers, else an empty text."""
    if len(labels) <= MAX_SHOWN or any(_number(label) is None for label in labels):
        return ""
    return f"the {len(labels)} labels are all numbers; set --regression if they are quantities"


# Reading --------------------------------------------------------------------------------------


def _rows(path: Path, texts: Sequence[str], label: str, encoding: str) -> list[Row]:
    try:
        content = path.read_text(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"'{path}' is not {encoding}: {error.reason} at byte {error.start}; "
            "set --encoding, such as latin-1"
        ) from error
    except LookupError as error:
        raise ValueError(f"--encoding {encoding!r} is not known; try latin-1") from error
    if path.suffix.lower() == ".csv":
        rows = _from_table(path, _records(path, content), texts, label)
    elif path.suffix.lower() in (".jsonl", ".json"):
        rows = _from_table(path, _objects(path, content), texts, label)
    else:
        rows = _from_lines(path, content)
    if not rows:
        raise ValueError(f"'{path}' holds no example")
    return rows


# Only line feeds end lines: str.splitlines also splits at characters that texts contain, such as
# latin-1's \x85.


def _from_lines(path: Path, content: str) -> list[Row]:
    rows = []
    for number, line in enumerate(content.split("\n"), 1):
        if line.strip():
            label, *text = re.split("[ \\t]", line.rstrip(), maxsplit=1)
            if not text:
                raise ValueError(
                    f"'{path}', line {number} is {line[:40]!r}; expected a label, a space or tab, a text"
                )
            rows.append(_row(path, number, tuple(text), label))
    return rows


def _records(path: Path, content: str) -> list[tuple[int, dict[str, Any]]]:
    reader = csv.reader(io.StringIO(content), strict=True)
    try:
        records = [(number, cells) for number, cells in enumerate(reader, 1) if cells]
    except csv.Error as error:
        raise ValueError(f"'{path}', line {reader.line_num} is not CSV: {error}") from error
    columns = records[0][1] if records else []
    for number, cells in records:
        if len(cells) > len(columns):
            raise ValueError(
                f"'{path}', line {number} has {len(cells)} fields, and the header names {len(columns)}; put texts with a"
                " comma in quotes"
            )
    return [(number, dict(zip(columns, cells, strict=False))) for number, cells in records[1:]]


def _objects(path: Path, content: str) -> list[tuple[int, dict[str, Any]]]:
    found = []
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"'{path}', line {number} is not JSON: {error.msg}") from error
        if not isinstance(row, dict):
            raise ValueError(f"'{path}', line {number} is not a JSON object")
        found.append((number, row))
    return found


def _from_table(
    path: Path, table: Sequence[tuple[int, Mapping[str, Any]]], texts: Sequence[str], label: str
) -> list[Row]:
    if not table:
        return []
    columns = list(dict.fromkeys(name for _, record in table for name in record))
    texts = texts or [name for name in columns if name not in (label, "id", "idx")]
    for name in (label, *texts):
        if name not in columns:
            raise ValueError(f"'{path}' has no column {name!r}, only {_listed(columns)}")
    if len(texts) not in (1, 2):
        raise ValueError(
            f"'{path}' has the columns {_listed(columns)}; "
            "name the column of the text, or two columns, with --text"
        )
    rows = []
    for number, record in table:
        for name in texts:
            if record.get(name) is None:
                raise ValueError(f"row {number} of '{path}' lacks the text {name!r}")
        given = tuple(str(record[name]) for name in texts)
        rows.append(_row(path, number, given, record.get(label)))
    return rows


def _row(path: Path, number: int, texts: tuple[str, ...], label: Any) -> Row:
    is_missing = label is None or label != label  # null, or the NaN that pandas writes for it
    row = Row(texts, "" if is_missing else str(label), path, number)
    if not row.label.strip():
        raise ValueError(f"{row.where} has no label; give it one, or leave the row out")
    return row


# Labels ---------------------------------------------------------------------------------------


def _classes(rows: Sequence[Row], path: Path) -> list[str]:
    found = sorted({row.label for row in rows})
    if len(found) < 2:
        raise ValueError(
            f"every label of '{path}' is {found[0]!r}; there are no classes to distinguish"
        )
    return sorted(found, key=int) if all(label.isdecimal() for label in found) else found


def _class_numbers(rows: Sequence[Row], classes: Sequence[str], path: Path) -> list[int]:
    numbers = {label: number for number, label in enumerate(classes)}
    for row in rows:
        if row.label not in numbers:
            hint = regression_hint([*classes, row.label])
            raise ValueError(
                f"{row.where} has the label {row.label!r}, which '{path}' does not have; it has "
                f"{_listed([repr(label) for label in classes])}{hint and f'; {hint}'}"
            )
    return [numbers[row.label] for row in rows]


def _check_numbers(rows: Sequence[Row]) -> None:
    for row in rows:
        if _number(row.label) is None:
            raise ValueError(
                f"{row.where} has the label {row.label!r}, which is not a finite number, "
                "as --regression needs"
            )


def _number(label: str) -> float | None:
    try:
        value = float(label)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _split(rows: Sequence[Row], path: Path, *, by_class: bool) -> tuple[list[Row], list[Row]]:
    """Return the examples to train on and those held out.

    The j-th of n examples of a class gets the rank (j + ½) / n, and the lowest ranks are held out, so
    each class loses the same share. The last example of a class is never held out.
    """
    wanted = min(MAX_HELD_OUT, len(rows) // 10)
    if not wanted:
        raise ValueError(
            f"'{path}' has {len(rows)} examples, too few to hold some out; give other examples with --dev"
        )
    shuffled = list(rows)
    random.Random(0).shuffle(shuffled)
    groups: dict[str, list[int]] = defaultdict(list)
    for at, row in enumerate(shuffled):
        groups[row.label if by_class else ""].append(at)
    ranks = sorted(
        ((j + 0.5) / len(own), at) for own in groups.values() for j, at in enumerate(own[:-1])
    )
    held_out = {at for _, at in ranks[:wanted]}
    if not held_out:
        hint = regression_hint(list(groups))
        raise ValueError(
            f"no label of '{path}' occurs twice, so none can be held out; "
            f"give other examples with --dev{hint and f', and {hint}'}"
        )
    train = [row for at, row in enumerate(shuffled) if at not in held_out]
    return train, [shuffled[at] for at in sorted(held_out)]


def _listed(values: Sequence[str]) -> str:
    more = len(values) - MAX_SHOWN
    return ", ".join(values[:MAX_SHOWN]) + (f" and {more} more" if more > 0 else "")

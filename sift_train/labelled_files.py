"""Reads labelled texts from local files: JSON lines, tables with a header, and lines of a label and a text."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sift_train.text_files import read_text, tell_unused

_SEPARATORS = {".csv": ",", ".tsv": "\t"}
_COLUMNS = ("text", "label")
_MAX_SHOWN = 200  # characters of the names of columns, in a message

_Row = tuple[int, list[str]]  # the line on which it ends, and its fields


class Example(NamedTuple):
    """A text with its label, and the line of the file on which it ends, counted from 1."""

    text: str
    label: str
    line: int


def read_labelled(path: Path) -> list[Example]:
    """Return the texts of a file with their labels.

    ``.jsonl`` has one object per line, and ``.csv`` and ``.tsv`` a header, with ``text`` and ``label``. In any
    other file, each line is a label, a tab or space, and a text; labels may have spaces if each line has a tab.

    Raises:
        OSError: the file cannot be read.
        ValueError: a line or row has another form, or there is none.
    """
    text, suffix = read_text(path, "examples"), path.suffix.lower()
    if suffix == ".jsonl":
        records = [(_parsed(line, at, path), at) for at, line in _lines(text)]
        found = [_example(record, at, path) for record, at in records]
        tell_unused(path, {key for record, _ in records for key in record if key not in _COLUMNS})
    elif suffix in _SEPARATORS:
        found = list(_of_table(text, path, _SEPARATORS[suffix]))
    elif _is_json(text) or _is_json(text.lstrip().partition("\n")[0]):
        raise ValueError(
            f"'{path}' looks like JSON, but is not named .jsonl; write one object with text and label on each line"
            " of a file named .jsonl"
        )
    else:
        found = list(_of_lines(text, path))
    if not found:
        raise ValueError(f"'{path}' has no example; give at least one")
    return found


def _of_lines(text: str, path: Path) -> Iterator[Example]:
    lines = list(_lines(text))
    has_tabs = all("\t" in line for _, line in lines)
    labels = {line.partition("\t")[0].strip() for _, line in lines} if has_tabs else set()
    if any(" " in label for label in labels) and 2 * len(labels) > len(lines):
        raise ValueError(
            f"each line of '{path}' has a tab, and it is not clear whether its label ends there or at the first space; write a"
            " file named .tsv or .csv with the columns text and label"
        )
    for at, line in lines:
        label, *rest = re.split("\t" if has_tabs else "[ \t]", line, maxsplit=1)
        if not rest or not label.strip():
            raise ValueError(
                f"line {at} of '{path}' has no space or tab between a label and a text"
            )
        yield Example(rest[0], label.strip(), at)


def _of_table(text: str, path: Path, separator: str) -> Iterator[Example]:
    columns = _columns_of(text, path, separator)
    rows = (
        _with_tabs(text, path, columns) if separator == "\t" else list(_rows(text, path, separator))
    )
    tell_unused(path, set(columns) - {*_COLUMNS})
    del rows[0]
    n_fields = {len(row) for _, row in rows}
    # Some programs end each line with a separator.
    all_end = len(n_fields) == 1 and not any(any(row[len(columns) :]) for _, row in rows)
    for at, row in rows:
        if len(row) > len(columns) and not all_end:
            advice = {",": "put texts with a comma in quotes", "\t": "a text must have no tab"}
            raise ValueError(
                f"line {at} of '{path}' has {len(row)} fields, and its header names {len(columns)}; {advice[separator]}"
            )
        yield _example(dict(zip(columns, row, strict=False)), at, path)


def _with_tabs(text: str, path: Path, columns: list[str]) -> list[_Row]:
    """Return the rows of a table with tabs, in which quotes may enclose texts or be a part of them."""
    plain = list(_rows(text, path, "\t", csv.QUOTE_NONE))
    try:
        rows = list(_rows(text, path, "\t"))
    except ValueError:
        return plain
    long = [(at, field) for at, row in rows for field in row if "\n" in field]
    if long and all(len(row) == len(columns) for _, row in plain):
        return plain
    for at, field in long:
        if "\t" in field:
            raise ValueError(
                f"line {at} of '{path}' ends a quoted text of several lines with a tab in it, and it is not clear whether the"
                " quotes are part of the texts; write a file named .jsonl"
            )
    return rows


def _columns_of(text: str, path: Path, separator: str) -> list[str]:
    """Return the names in the header of a table.

    Raises:
        ValueError: it does not have the columns of a text and a label, each once.
    """
    header = next((line for _, line in _lines(text)), "")
    columns = [name.strip() for name in next(csv.reader([header], delimiter=separator), [])]
    if any(columns.count(name) != 1 for name in _COLUMNS):
        shown = ", ".join(map(repr, columns))
        shown = shown if len(shown) <= _MAX_SHOWN else f"{shown[:_MAX_SHOWN]}…"
        raise ValueError(
            f"the header of '{path}' names the columns {shown}, expected 'text' and 'label', each once, with"
            f" {'a comma' if separator == ',' else 'a tab'} between them"
        )
    return columns


def _rows(
    text: str, path: Path, separator: str, quoting: int = csv.QUOTE_MINIMAL
) -> Iterator[_Row]:
    rows = csv.reader(io.StringIO(text), delimiter=separator, strict=True, quoting=quoting)  # type: ignore[arg-type]
    ended = 0
    try:
        for row in rows:
            ended = rows.line_num
            if any(map(str.strip, row)):
                yield ended, row
    except csv.Error as error:
        raise ValueError(
            f"line {ended + 1} of '{path}' is no row: {error}; close its quotes, double those within a quoted text, or write the"
            " texts in a file named .jsonl"
        ) from error


def _lines(text: str) -> Iterator[tuple[int, str]]:
    for at, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield at, line


def _is_json(text: str) -> bool:
    """Return whether a text is a JSON object or array."""
    try:
        return isinstance(json.loads(text), dict | list)
    except json.JSONDecodeError:
        return False


def _parsed(line: str, at: int, path: Path) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"line {at} of '{path}' is no JSON: {error.msg}") from error


def _example(record: Any, at: int, path: Path) -> Example:
    if not isinstance(record, Mapping) or not isinstance(record.get("text"), str):
        raise ValueError(f"line {at} of '{path}' has no text under 'text'")
    if not isinstance(record.get("label"), str | int) or not str(record["label"]).strip():
        raise ValueError(f"line {at} of '{path}' has no text or integer under 'label'")
    return Example(record["text"], str(record["label"]).strip(), at)

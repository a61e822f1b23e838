"""Reads labelled texts from local files: JSON lines, tables with a header, and lines of a label and a text."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sift_train.text_files import read_text

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
    other file, each line is a label, a tab or space, and a text; labels may have spaces if each line has one tab.

    Raises:
        OSError: the file cannot be read.
        ValueError: a line or row has another form, or there is none.
    """
    text, suffix = read_text(path, "examples"), path.suffix.lower()
    if suffix == ".jsonl":
        found = [_example(_parsed(line, at, path), at, path) for at, line in _lines(text)]
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
    has_tabs = all(line.count("\t") == 1 for _, line in lines)
    for at, line in lines:
        label, *rest = re.split("\t" if has_tabs else "[ \t]", line, maxsplit=1)
        if not rest or not label.strip():
            raise ValueError(
                f"line {at} of '{path}' has no space or tab between a label and a text"
            )
        yield Example(rest[0], label.strip(), at)


def _of_table(text: str, path: Path, separator: str) -> Iterator[Example]:
    try:
        rows = list(_rows(text, path, separator))
        is_quoted = separator == "," or not any("\n" in field for _, row in rows for field in row)
    except ValueError:
        if separator == ",":
            raise
        is_quoted = False
    if not is_quoted:  # quotes are part of the texts, as in the files of many datasets
        rows = list(_rows(text, path, separator, csv.QUOTE_NONE))
    (at, header), *rows = rows or [(1, [""])]
    columns = [name.strip() for name in header]
    if any(columns.count(name) != 1 for name in _COLUMNS):
        shown = ", ".join(map(repr, columns))
        shown = shown if len(shown) <= _MAX_SHOWN else f"{shown[:_MAX_SHOWN]}…"
        raise ValueError(
            f"line {at} of '{path}' names the columns {shown}, expected 'text' and 'label', each once, with"
            f" {'a comma' if separator == ',' else 'a tab'} between them"
        )
    for at, row in rows:
        if len(row) > len(columns):
            raise ValueError(
                f"line {at} of '{path}' has {len(row)} fields, and its header names {len(columns)}; "
                + (
                    "put texts with a comma in quotes"
                    if separator == ","
                    else "a text must have no tab"
                )
            )
        yield _example(dict(zip(columns, row, strict=False)), at, path)


def _rows(
    text: str, path: Path, separator: str, quoting: int = csv.QUOTE_MINIMAL
) -> Iterator[_Row]:
    rows = csv.reader(io.StringIO(text), delimiter=separator, strict=True, quoting=quoting)  # type: ignore[arg-type]
    ended = 0
    try:
        for row in rows:
            ended = rows.line_num
            if row:
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

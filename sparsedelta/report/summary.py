"""The result of ``inspect`` as a summary that fits the width of the terminal.

A delta may come from a stranger, so all names and values pass through ``printable`` and are never markup.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from sparsedelta.report.text import count, line_width, listed, numbers, percent, printable, size

if TYPE_CHECKING:
    from sparsedelta._typing import JSON
    from sparsedelta.ops.inspect import Inspection

_GAP = 2
_MAX_FILES = 8
_MAX_GROUPS = 8
_MAX_SETTINGS = 8
_MAX_NUMBERS = 8
_MAX_LABEL = 30
_MAX_VALUE = 60
_FINGERPRINT_DIGITS = 12


def summary_text(path: str | Path, found: Inspection, console: Console) -> str:
    """Return a summary: the facts about the delta, what it changes, and the size of each part.

    Args:
        path: path of the delta, as shown.
        found: what ``inspect`` returned for the delta.
        console: a console made by ``new_console``. Its width is set to that of the terminal.
    """
    facts = Table.grid(padding=(0, _GAP))
    facts.add_column(style="bold", no_wrap=True)
    facts.add_column(overflow="fold")
    for label, value in _facts(path, found):
        facts.add_row(label, value)
    console.width = line_width(is_terminal=console.is_terminal)
    with console.capture() as captured:
        for part in (facts, "", _sizes_table(found)):
            console.print(part)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def info_text(found: Inspection) -> str:
    """Return everything that the delta records about how it was made, as JSON."""
    lines = json.dumps(dict(found.info), indent=2, ensure_ascii=False).splitlines()
    return "\n".join(map(printable, lines))


def new_console() -> Console:
    """Return a console that prints all text literally, without markup."""
    return Console(markup=False, highlight=False, emoji=False)


def _facts(path: str | Path, found: Inspection) -> Iterator[tuple[str, str]]:
    share = "" if found.share is None else f", {percent(found.share)} of the target's tensors"
    n_bytes = found.sizes.file_bytes
    of_file = "" if n_bytes is None else f": {size(n_bytes)}{share}"
    yield "delta", printable(str(path)) + of_file
    fingerprint = f"fingerprint {found.base_fingerprint[:_FINGERPRINT_DIGITS]}…"
    yield "base", f"{printable(found.base_id)}, {fingerprint}" if found.base_id else fingerprint
    yield "target", _target(found)
    yield "files", _files(found)
    states = [f"{count(n)} {state}" for state, n in found.states.items() if n]
    unused = f"; {count(found.n_unused)} of the base not used" if found.n_unused else ""
    yield "tensors", ", ".join(states) + unused
    yield (
        "changed",
        f"{count(found.nnz)} of {count(found.numel, 'element')}, {percent(found.density)}",
    )
    if found.index_encodings:
        yield "positions", _chunks(found.index_encodings)
        yield "values", _chunks(found.value_encodings)
    yield from _settings(found.info)


def _target(found: Inspection) -> str:
    fingerprint = found.target_fingerprint
    known = f"{fingerprint[:_FINGERPRINT_DIGITS]}…" if fingerprint else "not known"
    return f"{found.target_kind}, {size(found.target_bytes)} of tensors, fingerprint {known}"


def _files(found: Inspection) -> str:
    parts = [count(len(found.weight_files), "weight file")]
    carried = [file.path for file in found.side_files if file.stored]
    n_kept = len(found.side_files) - len(carried)
    if carried:
        parts.append(f"{count(len(carried))} carried ({listed(carried, _MAX_FILES)})")
    if n_kept:
        parts.append(f"{count(n_kept)} taken from the base")
    if found.empty_folders:
        parts.append(count(len(found.empty_folders), "empty folder"))
    return ", ".join(parts)


def _chunks(encodings: Mapping[str, int]) -> str:
    return ", ".join(f"{name} in {count(n, 'chunk')}" for name, n in encodings.items())


def _settings(info: Mapping[str, JSON]) -> Iterator[tuple[str, str]]:
    """Yield a label and text for the single values of the info, and for each of the first groups."""
    grouped = [(name, value) for name, value in info.items() if isinstance(value, dict) and value]
    groups = dict(grouped[:_MAX_GROUPS])
    if single := {name: value for name, value in info.items() if name not in groups}:
        yield "info", _pairs(single)
    for name, group in groups.items():
        shown = numbers(group, _MAX_NUMBERS) or _pairs(group)
        yield _cut(f"info.{printable(name)}", _MAX_LABEL), shown


def _pairs(settings: Mapping[str, JSON]) -> str:
    pairs = [
        f"{_cut(name, _MAX_LABEL)} {_cut(_shown(value), _MAX_VALUE)}"
        for name, value in settings.items()
        if value not in (None, [], {})
    ]
    return listed(pairs, _MAX_SETTINGS)


def _shown(value: JSON) -> str:
    if isinstance(value, str):
        return value
    if many := numbers(value, _MAX_NUMBERS):
        return many
    if isinstance(value, list) and any(isinstance(item, list | dict) for item in value):
        return count(len(value), "item")  # a series or table: too long to show
    return json.dumps(value, ensure_ascii=False)


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"


def _sizes_table(found: Inspection) -> Table:
    sizes = found.sizes
    table = Table(box=None, padding=(0, _GAP, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("part")
    for title in ("size", "share", *(["bytes per change"] if found.nnz else [])):
        table.add_column(title, justify="right")
    for what, n_bytes, style in (
        ("tensors", sizes.payload_bytes, None),
        ("  positions", sizes.index_bytes, "dim"),
        ("  values", sizes.value_bytes, "dim"),
        ("side files", sizes.side_file_bytes, None),
        ("stored headers", sizes.stored_header_bytes, None),
        ("manifest", sizes.manifest_bytes, None),
        ("container header", sizes.header_bytes, None),
        ("whole file", sizes.file_bytes, "bold"),
    ):
        if n_bytes and sizes.file_bytes:
            per_change = [f"{n_bytes / found.nnz:,.2f}"] if found.nnz else []
            share = percent(n_bytes / sizes.file_bytes)
            table.add_row(what, size(n_bytes), share, *per_change, style=style)
    return table

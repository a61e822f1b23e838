"""The result of ``inspect`` as a summary that fits the width of the terminal.

A delta may come from a stranger, so all names and values pass through ``printable`` and are never markup.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sparsedelta.ops.layers import curve_points
from sparsedelta.ops.scores import recorded_scores
from sparsedelta.report.text import (
    STATE_STYLES,
    count,
    line_width,
    listed,
    numbers,
    percent,
    printable,
    size,
)
from sparsedelta.report.where import where_table

if TYPE_CHECKING:
    from sparsedelta._typing import JSON
    from sparsedelta.ops.inspect import Inspection

_GAP = 2
_MAX_FILES = 8
_MAX_GROUPS = 8
_MAX_SETTINGS = 5
_LINE = 62  # what fits beside a label in a line of 80 characters
_MAX_NUMBERS = 8
_MAX_LABEL = 30
_MAX_VALUE = 60
_FINGERPRINT_DIGITS = 12
_UNSURE = "yellow"  # what a reader cannot rely on
_COMMIT = re.compile(r"@[0-9a-f]{40}$")


def summary_text(path: str | Path, found: Inspection, console: Console) -> str:
    """Return a summary of one screen: facts about the delta, where it changes the model, and its parts.

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
    where = where_table(found, console.width) if console.encoding.startswith("utf") else None
    with console.capture() as captured:
        for part in (facts, *(("", where) if where else ())):
            console.print(part)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def info_text(found: Inspection) -> str:
    """Return everything that the delta records about how it was made, as JSON."""
    lines = json.dumps(dict(found.info), indent=2, ensure_ascii=False).splitlines()
    return "\n".join(map(printable, lines))


def new_console() -> Console:
    """Return a console that prints all text literally, without markup."""
    return Console(markup=False, highlight=False, emoji=False)


def _facts(path: str | Path, found: Inspection) -> Iterator[tuple[str, str | Text]]:
    share = "" if found.share is None else f", {percent(found.share)} of the target's tensors"
    n_bytes = found.sizes.file_bytes
    of_file = "" if n_bytes is None else f": {size(n_bytes)}{share}"
    yield "delta", printable(str(path)) + of_file
    yield "base", _base(found)
    yield "target", _target(found)
    yield "files", _files(found)
    yield "tensors", _states(found)
    yield (
        "changed",
        f"{count(found.nnz)} of {count(found.numel, 'element')}, {percent(found.density)}",
    )
    yield from _parts(found)
    if found.index_encodings:
        yield "coded", f"{_chunks(found.index_encodings)}; {_chunks(found.value_encodings)}"
    yield from _training(found)
    yield from _settings({k: v for k, v in found.info.items() if k not in _drawn(found.info)})


def _base(found: Inspection) -> Text:
    fingerprint = f"fingerprint {found.base_fingerprint[:_FINGERPRINT_DIGITS]}…"
    if not found.base_id:
        return Text.assemble(("not named", _UNSURE), f", {fingerprint}")
    return Text(f"{printable(_COMMIT.sub(_cut_commit, found.base_id))}, {fingerprint}")


def _cut_commit(found: re.Match[str]) -> str:
    return f"{found[0][: 1 + _FINGERPRINT_DIGITS]}…"


def _target(found: Inspection) -> Text:
    fingerprint = found.target_fingerprint
    known = f"{fingerprint[:_FINGERPRINT_DIGITS]}…" if fingerprint else ("not known", _UNSURE)
    size_text = f"{found.target_kind}, {size(found.target_bytes)} of tensors, fingerprint "
    return Text.assemble(size_text, known)


def _states(found: Inspection) -> Text:
    """Return how many tensors are in each state, each in the colour that it has in all tables."""
    states = [
        Text(f"{count(n)} {state}", STATE_STYLES[state]) for state, n in found.states.items() if n
    ]
    unused = f"; {count(found.n_unused)} of the base not used" if found.n_unused else ""
    return Text.assemble(Text(", ").join(states), unused)


def _drawn(info: Mapping[str, JSON]) -> set[str]:
    """Return the members of the info that have a line of their own or are shown by bars."""
    drawn = {"losses"} if len(curve_points(info)) > 1 else set()
    drawn |= {"evaluations"} if recorded_scores(info) else set()
    return drawn | {"mean_change"}


def _training(found: Inspection) -> Iterator[tuple[str, str]]:
    points = curve_points(found.info)
    if len(points) > 1:
        (_, first), (step, last) = points[0], points[-1]
        yield "loss", f"{first:.4g} → {last:.4g} in {count(step, 'step')}"
    if scores := recorded_scores(found.info):
        shown = [
            f"{_cut(name, _MAX_LABEL)} {old:.4g} → {new:.4g}" for name, old, new in scores.values
        ]
        before = "base" if scores.before_step == 0 else f"step {count(scores.before_step)}"
        yield "scores", f"{listed(shown, _MAX_SETTINGS)} (from {before})"


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
        if shown:
            yield _cut(f"info.{printable(name)}", _MAX_LABEL), shown


def _pairs(settings: Mapping[str, JSON]) -> str:
    pairs = [
        f"{_cut(name, _MAX_LABEL)} {_cut(_shown(value), _MAX_VALUE)}"
        for name, value in settings.items()
        if value not in (None, [], {})
    ]
    n_shown = min(_MAX_SETTINGS, len(pairs))
    while n_shown > 1 and len(listed(pairs, n_shown)) > _LINE:
        n_shown -= 1
    return listed(pairs, n_shown)


def _shown(value: JSON) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        return f"{value:.4g}"
    if many := numbers(value, _MAX_NUMBERS):
        return many
    if isinstance(value, list) and any(isinstance(item, list | dict) for item in value):
        return count(len(value), "item")  # a series or table: too long to show
    return json.dumps(value, ensure_ascii=False)


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"


def _parts(found: Inspection) -> Iterator[tuple[str, str]]:
    """Yield the size of each part of the file, and the bytes per changed element."""
    sizes = found.sizes
    parts = (
        ("positions", sizes.index_bytes),
        ("values", sizes.value_bytes),
        ("side files", sizes.side_file_bytes),
        ("stored headers", sizes.stored_header_bytes),
        ("manifest", sizes.manifest_bytes),
        ("header", sizes.header_bytes),
    )
    known = [(what, n) for what, n in parts if n]
    whole = sizes.file_bytes
    shares = [f"{what} {size(n)}{f' ({percent(n / whole)})' if whole else ''}" for what, n in known]
    if shares:
        yield "parts", ", ".join(shares)
    coded, file = found.payload_bytes_per_change, found.file_bytes_per_change
    if coded is not None:
        of_file = "" if file is None else f", {file:,.2f} of the whole file"
        yield "per change", f"{coded:,.2f} bytes of positions and values{of_file}"

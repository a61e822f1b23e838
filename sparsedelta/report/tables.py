"""Tables of the tensors that a delta touches, one table for each state.

They are formatted without rich, which takes 0.3 ms a row: some models have 100 000 tensors.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from sparsedelta.ops.inspect import STATES
from sparsedelta.report.text import STATE_STYLES, count, line_width, percent, printable, size

if TYPE_CHECKING:
    from sparsedelta.ops.inspect import Inspection, TensorInspection

_GAP = "  "
_INDENT = "  "
_MIN_NAME = 20
_COLOURS = {"yellow": ";33", "green": ";32", "cyan": ";36", "blue": ";34"}


def tensors_text(found: Inspection) -> str:
    """Return the tables as text. Unchanged tensors are only counted."""
    width = line_width(is_terminal=sys.stdout.isatty())
    lines = []
    for state in STATES[:-1]:
        tensors = [tensor for tensor in found.tensors if tensor.state == state]
        if tensors:
            lines += ["", *_tensors_table(state, tensors, width)]
    if n_unchanged := found.states[STATES[-1]]:
        lines += ["", f"{count(n_unchanged, f'{STATES[-1]} tensor')} not listed"]
    return "\n".join(lines)


def _tensors_table(state: str, tensors: Sequence[TensorInspection], width: int) -> list[str]:
    """Return the lines of a table.

    A dtype or encoding that all tensors share is in the heading, so that more width is left for names.
    """
    heading = f"{state}: {count(len(tensors), 'tensor')}"
    columns = {}
    for title, cell in _COLUMNS.items():
        cells = [cell(tensor) for tensor in tensors]
        if title in _SHARED and len(set(cells)) == 1:
            heading += f", {cells[0]}" if cells[0] else ""
        elif any(cells):
            columns[title] = [title, *cells]
    names = ["tensor", *(printable(tensor.name) for tensor in tensors)]
    longest = max(map(len, names))
    if _name_width(columns, width) < longest:
        columns.pop("encodings", None)
    name_width = min(longest, max(_MIN_NAME, _name_width(columns, width)))
    padded = [_padded(cells, right=title in _NUMBERS) for title, cells in columns.items()]
    lines = [
        _line(_folded(name, name_width), name_width, cells)
        for name, *cells in zip(names, *padded, strict=True)
    ]
    return [_bold(heading, _COLOURS[STATE_STYLES[state]]), _bold(lines[0]), *lines[1:]]


def _bold(text: str, colour: str = "") -> str:
    return f"\x1b[1{colour}m{text}\x1b[0m"


def _padded(cells: Sequence[str], *, right: bool) -> list[str]:
    width = max(map(len, cells))
    return [cell.rjust(width) if right else cell.ljust(width) for cell in cells]


def _line(name: Sequence[str], name_width: int, cells: Sequence[str]) -> str:
    first = _GAP.join([name[0].ljust(name_width), *cells]).rstrip()
    return "\n".join([first, *name[1:]])


def _name_width(columns: Mapping[str, Sequence[str]], width: int) -> int:
    """Return the width that these columns leave for names."""
    return width - sum(len(_GAP) + max(map(len, cells)) for cells in columns.values())


def _folded(name: str, width: int) -> list[str]:
    """Return a name as lines of at most ``width`` characters, broken before dots if possible."""
    lines = []
    while len(name) > width:
        cut = name.rfind(".", len(_INDENT) + 1, width + 1)
        cut = width if cut < 0 else cut
        lines.append(name[:cut])
        name = _INDENT + name[cut:]
    return [*lines, name]


def _shape(tensor: TensorInspection) -> str:
    after = _dimensions(tensor.shape)
    before = after if tensor.base_shape is None else _dimensions(tensor.base_shape)
    return after if before == after else f"{before} → {after}"


def _dimensions(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape)) if shape else "scalar"


def _encodings(tensor: TensorInspection) -> str:
    return "/".join([*tensor.index_encodings, *tensor.value_encodings])


_COLUMNS: dict[str, Callable[[TensorInspection], str]] = {
    "dtype": lambda tensor: tensor.dtype,
    "shape": _shape,
    "changed": lambda tensor: count(tensor.nnz) if tensor.numel else "",
    "density": lambda tensor: percent(tensor.density) if tensor.numel else "",
    "size": lambda tensor: size(tensor.payload_bytes) if tensor.numel else "",
    "encodings": _encodings,
}
_NUMBERS = {"changed", "density", "size"}
_SHARED = {"dtype", "encodings"}

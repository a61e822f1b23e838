"""Maps of a delta as HTML tables: a row for each kind of tensor, a column for each layer.

They need no script. Three sizes of the cells can be chosen; the largest shows the numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from itertools import count

from sparsedelta.ops.layers import Cell, Grid
from sparsedelta.report.scale import Scale
from sparsedelta.report.text import percent, printable

MAX_LAYERS = 512
MAX_KINDS = 96
_STRONG = 0.646  # above this strength, the other colour of text is easier to read
_TICK = 10  # the smallest cells number one layer in ten
_NO_CELL = '<td class="none"></td>'


def text(value: object) -> str:
    """Return a value as escaped text, with unprintable characters as escape sequences."""
    return escape(printable(str(value)))


def density_map(grid: Grid, scale: Scale, numbers: count[int]) -> str:
    """Return the map of the share of elements that changed; empty if none changed.

    Args:
        grid: a stack of layers.
        scale: the densities of all cells of the page.
        numbers: gives each map of the page a number of its own.
    """
    return _map(grid, lambda cell: _density_cell(cell, scale), next(numbers))


def change_map(grid: Grid, scale: Scale, numbers: count[int]) -> str:
    """Return the map of the mean |change| of the elements that changed; arguments as ``density_map``."""
    return _map(grid, lambda cell: _change_cell(cell, scale), next(numbers))


def legend(scale: Scale, shown: Callable[[float], str]) -> str:
    """Return the legend of the colours, or a sentence if the values are nearly equal."""
    if not scale.high:
        return ""
    if scale.is_even:
        values = f"{shown(scale.low)} to {shown(scale.high)}"
        return f"<p>About the same everywhere: {shown(scale.high) if scale.low == scale.high else values}.</p>"
    return f'<p class="scale"><span>0</span><i></i><span>{shown(scale.high)}</span></p>'


def _map(grid: Grid, render: Callable[[Cell], str], number: int) -> str:
    kinds, layers = grid.changed_kinds[:MAX_KINDS], grid.layers[:MAX_LAYERS]
    if not kinds:
        return ""
    rows = []
    for kind in kinds:
        found = (grid.cells.get((layer, kind)) for layer in layers)
        cells = "".join(render(cell) if cell else _NO_CELL for cell in found)
        rows.append(f'<tr><th scope="row"><span>{_breakable(kind)}</span></th>{cells}</tr>')
    stack = text(grid.stack or "layers")
    return (
        f'<div class="map">{_sizes(len(layers), number, stack)}<div class="wide" role="region" tabindex="0" '
        f'aria-label="map of {stack}, number {number}"><table class="heat"><caption>{stack}: tensors by layer'
        f'</caption><thead><tr><td class="none"></td>{"".join(map(_heading, layers))}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>{_left_out(grid, len(kinds), len(layers))}</div>"
    )


def _sizes(n_layers: int, number: int, stack: str) -> str:
    chosen = "numbers" if n_layers <= 12 else "cells" if n_layers <= 32 else "small"
    choices = "".join(
        f'<label><input type="radio" name="zoom-{number}" value="{value}"'
        f"{' checked' if value == chosen else ''}>{label}</label>"
        for value, label in (
            ("small", "overview"),
            ("cells", "larger"),
            ("numbers", "with numbers"),
        )
    )
    return f'<fieldset class="zoom"><legend>Size of the map of {stack}</legend>{choices}</fieldset>'


def _breakable(name: str) -> str:
    """Return a name that may be broken after its dots."""
    return text(name).replace(".", ".<wbr>")


def _heading(layer: int) -> str:
    between = ' class="between"' if layer % _TICK else ""
    return f'<th scope="col"{between}><span>{layer}</span></th>'


def _left_out(grid: Grid, n_kinds: int, n_layers: int) -> str:
    parts = []
    if more := len(grid.changed_kinds) - n_kinds:
        parts.append(f"{more:,} more kinds of tensors are not drawn")
    if more := len(grid.layers) - n_layers:
        parts.append(f"{more:,} more layers are not drawn")
    return f"<p>{'; '.join(parts)}.</p>" if parts else ""


def _density_cell(cell: Cell, scale: Scale) -> str:
    tooltip = f"{cell.nnz:,} of {cell.numel:,} changed, {percent(cell.density)}"
    if not cell.nnz:
        return _cell(cell, tooltip, "–", None)
    return _cell(cell, tooltip, percent(cell.density), scale.strength(cell.density))


def _change_cell(cell: Cell, scale: Scale) -> str:
    if not cell.nnz:
        return _cell(cell, "unchanged", "–", None)
    mean = cell.mean_change
    if mean is None:
        return _cell(cell, "not recorded", "?", None)
    tooltip = f"mean |change| {mean:.3g} of {cell.nnz:,} changed"
    return _cell(cell, tooltip, f"{mean:.2g}", scale.strength(mean))


def _cell(cell: Cell, tooltip: str, shown: str, strength: float | None) -> str:
    names = f"{', '.join(cell.names[:3])}{', …' if len(cell.names) > 3 else ''}"
    title = f'title="{text(f"{names}: {tooltip}")}"'
    if strength is None:
        return f'<td class="same" {title}><span>{shown}</span></td>'
    look = ' class="strong"' if strength > _STRONG else ""
    return f'<td{look} style="--s:{strength:.3f}" {title}><span>{shown}</span></td>'

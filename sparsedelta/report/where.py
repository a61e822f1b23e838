"""Where a delta changes a model, as lines for the terminal: a bar for each layer, a line for each kind of tensor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from sparsedelta.ops.layers import Cell, by_layer
from sparsedelta.report.scale import Scale
from sparsedelta.report.text import count, percent, printable

if TYPE_CHECKING:
    from sparsedelta.ops.inspect import Inspection

BARS = "▁▂▃▄▅▆▇█"
MAX_LINES = 5
_MAX_NAME = 36
_MIN_BARS, _MAX_BARS = 8, 64
_OTHER_COLUMNS = 13  # the density, and the gaps between columns
_DENSITY_STYLE, _CHANGE_STYLE = "blue", "yellow"


def where_table(found: Inspection, width: int) -> Table | None:
    """Return a table of the kinds of tensors with the most changed elements; None if nothing changed.

    The bars show the density by layer. Where all densities are nearly equal and the training recorded the
    changes, they show the mean |change|. Several layers share a bar if there are more layers than bars.

    Args:
        found: what ``inspect`` returned for the delta.
        width: of the terminal, in characters.
    """
    lines = sorted(_lines(found), key=lambda line: -sum(cell.nnz for cell in line[1]))
    lines = [line for line in lines if any(cell.nnz for cell in line[1])]
    if not lines:
        return None
    cells = [cell for _, own in lines for cell in own if len(own) > 1]
    density = Scale(cell.density for cell in cells)
    shows_change = density.is_even and any(cell.mean_change for cell in cells)
    scale = Scale(cell.mean_change or 0.0 for cell in cells) if shows_change else density
    longest = min(_MAX_NAME, max(len(printable(name)) for name, _ in lines[:MAX_LINES]))
    n_bars = min(_MAX_BARS, max(_MIN_BARS, width - longest - _OTHER_COLUMNS))
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("most changed", max_width=_MAX_NAME, overflow="ellipsis", no_wrap=True)
    table.add_column("|change| by layer" if shows_change else "density by layer", no_wrap=True)
    table.add_column("density", justify="right", no_wrap=True)
    for name, own in lines[:MAX_LINES]:
        values = [(cell.mean_change or 0.0) if shows_change else cell.density for cell in own]
        style = _CHANGE_STYLE if shows_change else _DENSITY_STYLE
        bars = Text(_bars(values, scale, n_bars) if len(own) > 1 else "", style=style)
        numel = sum(cell.numel for cell in own)
        table.add_row(printable(name), bars, percent(sum(cell.nnz for cell in own) / numel))
    if len(lines) > MAX_LINES:
        table.add_row(f"and {count(len(lines) - MAX_LINES, 'more kind')}", style="dim")
    return table


def _lines(found: Inspection) -> Iterator[tuple[str, Sequence[Cell]]]:
    """Yield the name of each kind of tensor and its cells in the order of the layers."""
    grids, single = by_layer(found.tensors, found.mean_changes)
    for grid in grids:
        for kind in grid.kinds:
            known = (grid.cells.get((layer, kind)) for layer in grid.layers)
            yield kind if len(grids) == 1 else f"{grid.stack}.*.{kind}", [c for c in known if c]
    for cell in single:
        yield cell.names[0], [cell]


def _bars(values: Sequence[float], scale: Scale, n_bars: int) -> str:
    """Return one character for each value, or for the largest of as many values as must share one."""
    each = -(-len(values) // n_bars)
    shared = [max(values[at : at + each]) for at in range(0, len(values), each)]
    return "".join(_bar(value, scale) for value in shared)


def _bar(value: float, scale: Scale) -> str:
    return BARS[min(7, int(8 * scale.strength(value)))] if value else "·"

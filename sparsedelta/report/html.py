"""The result of ``inspect`` as a self-contained HTML page, without scripts, fonts or links.

A delta may come from a stranger, so every text from it is escaped.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from sparsedelta.fs import check_no_folder, staged_output
from sparsedelta.ops.inspect import Inspection
from sparsedelta.ops.layers import Cell, Grid, by_layer, curve_points
from sparsedelta.report.text import percent, printable, size

MAX_TENSOR_ROWS = 2000
_DRAWN = ("losses", "mean_change")  # members of the info that have their own figures
_NO_CELL = '<td class="none"></td>'
WIDTH, HEIGHT, LEFT, BOTTOM, MARGIN = 720, 240, 56, 34, 12

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #5b6675; --line: #d9dee5; --page: #fff;
  --heat: 21, 101, 192; --curve: #1565c0; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ee; --soft: #9aa5b4; --line: #333b46;
  --page: #14181d; --heat: 88, 166, 255; --curve: #58a6ff; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page);
  max-width: 1100px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; margin: 0 0 .2rem; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
p { margin: .2rem 0 .8rem; color: var(--soft); max-width: 75ch; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .6rem; text-align: right; border-bottom: 1px solid var(--line); }
th { font-weight: 600; color: var(--soft); }
th:first-child, td:first-child { text-align: left; overflow-wrap: anywhere; }
.facts td { text-align: left; }
.heat { border-spacing: 2px; border-collapse: separate; }
.heat th, .heat td { border: 0; font-size: .8rem; padding: .25rem .4rem; }
.heat td { min-width: 2.7rem; text-align: center; border-radius: 3px; outline: 1px solid var(--line); }
.heat td:first-child { text-align: center; }
.heat td.dark { color: var(--page); }
.heat td.none { outline: 0; }
.heat thead th { writing-mode: vertical-rl; transform: rotate(180deg); text-align: left;
  font-weight: 400; vertical-align: bottom; max-height: 16rem; }
svg { max-width: 100%; height: auto; }
svg text { font: 12px system-ui, sans-serif; fill: var(--soft); }
svg .axis { stroke: var(--line); } svg .curve { stroke: var(--curve); fill: none; stroke-width: 2; }
code { font-size: .85em; overflow-wrap: anywhere; }
"""


def page(found: Inspection, *, title: str) -> str:
    """Return the HTML page that shows what a delta changes.

    Args:
        found: what ``inspect`` returned for the delta.
        title: heading of the page, such as the file's name.
    """
    grids, single = by_layer(found.tensors, found.mean_changes)
    cells = _all_cells(grids, single)
    highest = max((cell.density for cell in cells), default=0.0)
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "style-src 'unsafe-inline'\">",
        f"<title>{_text(title)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{_text(title)}</h1>",
        f"<p>{_sentence(found)}</p>",
        _facts(found),
        *_curve_section(found.info),
        "<h2>Where it changes the model</h2>",
        "<p>Share of elements that changed, by layer and kind of tensor; the darkest cell is "
        f"{percent(highest)}. Point at a cell for its counts.</p>",
        *(_heat(grid, _density_cell, highest) for grid in grids),
        *_change_section(grids, cells),
        _singles(single),
        _tensor_table(found),
        _settings(found.info),
        "</body></html>",
    ]
    return "\n".join(part for part in parts if part) + "\n"


def write_page(found: Inspection, path: Path, *, title: str, overwrite: bool) -> None:
    """Write the page to a file, which appears when it is complete.

    Args:
        found: what ``inspect`` returned for the delta.
        path: the file.
        title: heading of the page.
        overwrite: whether an existing file may be replaced.

    Raises:
        FileExistsError: the file exists and ``overwrite`` is false.
        FileNotFoundError: its folder does not exist.
        IsADirectoryError: ``path`` is a folder.
    """
    check_no_folder(path)
    with staged_output(path, overwrite=overwrite) as staged, open(staged, "wb") as file:
        file.write(page(found, title=title).encode("utf-8"))
        file.flush()
        os.fsync(file.fileno())


def _text(value: object) -> str:
    """Return a value as escaped text, with unprintable characters as escape sequences."""
    return escape(printable(str(value)))


def _size(n_bytes: int | None) -> str:
    return "unknown" if n_bytes is None else size(n_bytes)


def _sentence(found: Inspection) -> str:
    n_changed = len(found.tensors) - found.states["unchanged"]
    delta_size = _size(found.sizes.file_bytes)
    return (
        f"Changes {found.nnz:,} of {found.numel:,} elements ({percent(found.density)}) in "
        f"{n_changed:,} of {len(found.tensors):,} tensors; {delta_size} for a target of "
        f"{_size(found.target_bytes)}."
    )


def _facts(found: Inspection) -> str:
    target = found.target_fingerprint or "unknown"
    rows = [
        ("base", _text(found.base_id or "not named")),
        ("base fingerprint", f"<code>{_text(found.base_fingerprint)}</code>"),
        ("target fingerprint", f"<code>{_text(target)}</code>"),
        ("positions", _size(found.sizes.index_bytes)),
        ("values", _size(found.sizes.value_bytes)),
        ("files carried", str(sum(file.stored is not None for file in found.side_files))),
    ]
    body = "".join(f"<tr><th>{name}</th><td>{value}</td></tr>" for name, value in rows)
    return f'<table class="facts">{body}</table>'


def _all_cells(grids: Iterable[Grid], single: Iterable[Cell]) -> list[Cell]:
    return [*(cell for grid in grids for cell in grid.cells.values()), *single]


def _change_section(grids: Sequence[Grid], cells: Iterable[Cell]) -> list[str]:
    """Return the section with the mean change of the elements; empty if the info does not record it."""
    recorded = [grid for grid in grids if grid.has_mean_change]
    if not recorded:
        return []
    highest = max(cell.mean_change or 0.0 for cell in cells)
    return [
        "<h2>How much it changes the values</h2>",
        "<p>Mean |change| of the elements that changed, as recorded by the training; the darkest "
        f"cell is {highest:.3g}.</p>",
        *(_heat(grid, _change_cell, highest, list_unchanged=False) for grid in recorded),
    ]


def _heat(
    grid: Grid,
    render: Callable[[Cell, float], str],
    highest: float,
    *,
    list_unchanged: bool = True,
) -> str:
    kinds = grid.changed_kinds
    if not kinds:
        return ""
    head = "".join(f'<th scope="col">{_text(kind)}</th>' for kind in kinds)
    rows = []
    for layer in grid.layers:
        found = (grid.cells.get((layer, kind)) for kind in kinds)
        cells = "".join(render(cell, highest) if cell else _NO_CELL for cell in found)
        rows.append(f'<tr><th scope="row">{layer}</th>{cells}</tr>')
    return (
        f'<div class="wide"><table class="heat"><caption>{_text(grid.stack or "layers")}</caption>'
        f"<thead><tr><td class='none'></td>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
        f"</table></div>{_unchanged_kinds(grid) if list_unchanged else ''}"
    )


def _unchanged_kinds(grid: Grid) -> str:
    same = [kind for kind in grid.kinds if kind not in grid.changed_kinds]
    return f"<p>Unchanged in every layer: {_text(', '.join(same))}.</p>" if same else ""


def _density_cell(cell: Cell, highest: float) -> str:
    tooltip = f"{cell.nnz:,} of {cell.numel:,} changed, {percent(cell.density)}"
    shown = percent(cell.density) if cell.nnz else "–"
    return _heat_cell(cell, tooltip, shown, _strength(cell.density, highest))


def _change_cell(cell: Cell, highest: float) -> str:
    if not cell.nnz:
        return _heat_cell(cell, "unchanged", "–", 0.0)
    if cell.mean_change is None:
        return _heat_cell(cell, "not recorded", "?", 0.0)
    tooltip = f"mean |change| {cell.mean_change:.3g} of {cell.nnz:,} changed"
    return _heat_cell(
        cell, tooltip, f"{cell.mean_change:.2g}", _strength(cell.mean_change, highest)
    )


def _heat_cell(cell: Cell, tooltip: str, shown: str, strength: float) -> str:
    names = f"{', '.join(cell.names[:3])}{', …' if len(cell.names) > 3 else ''}"
    look = ' class="dark"' if strength > 0.62 else ""
    return (
        f'<td{look} style="background: rgba(var(--heat), {strength:.3f})" '
        f'title="{_text(f"{names}: {tooltip}")}">{shown}</td>'
    )


def _strength(value: float, highest: float) -> float:
    """Return the depth of colour, 0 to 1, on a square-root scale, because values range over decades."""
    return math.sqrt(value / highest) if highest else 0.0


def _singles(cells: Sequence[Cell]) -> str:
    changed = [cell for cell in cells if cell.nnz]
    if not changed:
        return ""
    rows = "".join(_cell_row(_text(cell.names[0]), cell) for cell in changed)
    return (
        "<h2>Outside the layers</h2><table><thead><tr><th>tensor</th><th>changed</th><th>of</th>"
        f"<th>density</th><th>mean |change|</th></tr></thead><tbody>{rows}</tbody></table>"
    )


def _cell_row(name: str, cell: Cell) -> str:
    return (
        f"<tr><td>{name}</td><td>{cell.nnz:,}</td><td>{cell.numel:,}</td>"
        f"<td>{percent(cell.density)}</td>"
        f"<td>{'?' if cell.mean_change is None else f'{cell.mean_change:.2g}'}</td></tr>"
    )


def _tensor_table(found: Inspection) -> str:
    touched = [tensor for tensor in found.tensors if tensor.state != "unchanged"]
    shown = touched[:MAX_TENSOR_ROWS]
    rows = "".join(
        f"<tr><td>{_text(t.name)}</td><td>{_text(t.state)}</td><td>{_text(t.dtype)}</td>"
        f"<td>{' × '.join(map(str, t.shape))}</td><td>{t.nnz:,}</td>"
        f"<td>{percent(t.density)}</td><td>{_size(t.payload_bytes)}</td></tr>"
        for t in shown
    )
    left = len(touched) - len(shown)
    more = f"<p>{left:,} more are not listed.</p>" if left else ""
    head = ("tensor", "state", "dtype", "shape", "changed", "density", "coded")
    columns = "".join(f"<th>{name}</th>" for name in head)
    return (
        f"<h2>Tensors</h2><details><summary>{len(touched):,} touched</summary>"
        f'<div class="wide"><table><thead><tr>{columns}</tr></thead><tbody>{rows}</tbody></table>'
        f"</div>{more}</details>"
    )


def _settings(info: Any) -> str:
    flat = dict(_flatten("", {k: v for k, v in info.items() if k not in _DRAWN}))
    if not flat:
        return ""
    rows = "".join(
        f"<tr><th>{_text(k)}</th><td>{_text(_short(v))}</td></tr>" for k, v in flat.items()
    )
    return f'<h2>How it was made</h2><table class="facts">{rows}</table>'


def _short(value: Any) -> str:
    is_list = isinstance(value, Sequence) and not isinstance(value, str)
    text = ", ".join(map(str, value)) or "none" if is_list else str(value)
    return text if len(text) <= 300 else text[:300] + " …"


def _flatten(prefix: str, value: Any) -> Iterable[tuple[str, object]]:
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _flatten(f"{prefix}.{key}" if prefix else key, inner)
    else:
        yield prefix, value


def _curve_section(info: Any) -> list[str]:
    points = curve_points(info)
    if len(points) < 2:
        return []
    first, last = points[0], points[-1]
    caption = f"From {first[1]:.4g} to {last[1]:.4g} in {last[0]:,} steps."
    return ["<h2>Loss</h2>", f"<p>{caption}</p>", _curve(points)]


def _curve(points: Sequence[tuple[int, float]]) -> str:
    steps, losses = [step for step, _ in points], [loss for _, loss in points]
    low, high = min(*losses, 0.0), max(losses)
    begin, end = min(steps), max(steps)

    def x(step: float) -> float:
        return LEFT + (step - begin) / max(end - begin, 1) * (WIDTH - LEFT - MARGIN)

    def y(loss: float) -> float:
        return MARGIN + (high - loss) / ((high - low) or 1.0) * (HEIGHT - BOTTOM - MARGIN)

    path = " ".join(f"{x(step):.1f},{y(loss):.1f}" for step, loss in points)
    lines = []
    for number in range(5):
        value = low + (high - low) * number / 4
        lines.append(
            f'<line class="axis" x1="{LEFT}" x2="{WIDTH - MARGIN}" y1="{y(value):.1f}" '
            f'y2="{y(value):.1f}"/><text x="{LEFT - 8}" y="{y(value) + 4:.1f}" '
            f'text-anchor="end">{value:.3g}</text>'
        )
    below = HEIGHT - BOTTOM + 18
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" role="img" '
        f'aria-label="loss by step">{"".join(lines)}'
        f'<text x="{LEFT}" y="{below}">{begin:,}</text>'
        f'<text x="{WIDTH - MARGIN}" y="{below}" text-anchor="end">step {end:,}</text>'
        f'<polyline class="curve" points="{path}"/></svg>'
    )

"""The result of ``inspect`` as a self-contained HTML page, without scripts, fonts or links.

A delta may come from a stranger, so every text from it is escaped.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from importlib.resources import files
from itertools import count
from pathlib import Path
from typing import Any

from sparsedelta.fs import check_no_folder, staged_output
from sparsedelta.ops.inspect import Inspection
from sparsedelta.ops.layers import Cell, Grid, by_layer, curve_points
from sparsedelta.ops.scores import recorded_scores
from sparsedelta.report.curve import curve
from sparsedelta.report.heat import change_map, density_map, legend, text
from sparsedelta.report.scale import Scale
from sparsedelta.report.text import percent, size

MAX_TENSOR_ROWS = 2000
MAX_FILE_ROWS = 200
_DRAWN = ("losses", "mean_change", "evaluations")  # members of the info that have their own figures
_SHORT_ID = 12


def page(found: Inspection, *, title: str) -> str:
    """Return the HTML page that shows what a delta changes.

    Args:
        found: what ``inspect`` returned for the delta.
        title: heading of the page, such as the file's name.
    """
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "style-src 'unsafe-inline'\">",
        f"<title>{text(title)}</title><style>{_style()}</style></head><body><main>",
        f"<h1>{text(title)}</h1>",
        _cards(found),
        *_maps(found),
        *_curve_section(found.info),
        *_scores_section(found.info),
        _files(found),
        _sizes(found),
        _tensor_table(found),
        _settings(found),
        "</main></body></html>",
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


@cache
def _style() -> str:
    return files("sparsedelta.report").joinpath("page.css").read_text("utf-8")


# ---- the cards


def _cards(found: Inspection) -> str:
    cards = "".join(
        f"<div><dt>{label}</dt><dd{look}>{value}</dd><dd>{more}</dd></div>"
        for label, value, more, look in _facts(found)
    )
    return f'<dl class="cards">{cards}</dl>'


def _facts(found: Inspection) -> Iterator[tuple[str, str, str, str]]:
    """Yield label, value, explanation and class of each card."""
    n_bytes = found.sizes.file_bytes
    of_target = f"{size(found.target_bytes)} of tensors"
    share = "" if found.share is None else f"{percent(found.share)} of "
    yield "Size", "unknown" if n_bytes is None else size(n_bytes), f"{share}{of_target}", ""
    changed = f"{found.nnz:,} of {found.numel:,} elements"
    yield "Changed", percent(found.density), changed, ""
    states = [f"{n:,} {state}" for state, n in found.states.items() if n]
    n_touched = len(found.tensors) - found.states["unchanged"]
    yield "Tensors", f"{n_touched:,} of {len(found.tensors):,}", ", ".join(states), ""
    name, _, revision = (found.base_id or "not named").partition("@")
    at = f"at <code>{text(revision[:_SHORT_ID])}</code>, " if revision else ""
    fingerprint = f"{at}fingerprint <code>{text(found.base_fingerprint[:_SHORT_ID])}</code>"
    yield "Base", text(name), fingerprint, ' class="long"'
    target = found.target_fingerprint
    what = "every tensor" if target else "every changed value"
    shown = f"<code>{text(target[:_SHORT_ID])}</code>" if target else "not known"
    yield "Verified when applied", what, f"target fingerprint {shown}", ' class="long"'


# ---- the maps


def _maps(found: Inspection) -> list[str]:
    """Return the sections of the maps; where all densities are nearly equal, |change| comes first."""
    if not found.nnz:
        return ["<h2>Where it changes the model</h2>", "<p>No element changed.</p>"]
    grids, single = by_layer(found.tensors, found.mean_changes)
    cells = [cell for grid in grids for cell in grid.cells.values()]
    numbers = count(1)
    density = Scale(cell.density for cell in cells)
    change = _change_section(grids, cells, numbers) if density.is_even else []
    where = [
        "<section><h2>Where it changes the model</h2>",
        "<p>Share of the elements that changed, by kind of tensor and layer. Outlined cells are unchanged.</p>",
        legend(density, percent),
        *(density_map(grid, density, numbers) for grid in grids),
        _unchanged_kinds(grids),
        "</section>",
    ]
    if not density.high:  # only tensors outside the layers changed
        where = []
    later = [] if density.is_even else _change_section(grids, cells, numbers)
    return [*change, *where, *later, _singles(single)]


def _change_section(grids: Sequence[Grid], cells: Iterable[Cell], numbers: count[int]) -> list[str]:
    """Return the section with the mean change of the elements; empty if the info does not record it."""
    recorded = [grid for grid in grids if grid.has_mean_change]
    if not recorded:
        return []
    scale = Scale(cell.mean_change or 0.0 for cell in cells)
    return [
        '<section class="change"><h2>How much it changes the values</h2>',
        "<p>Mean |change| of the elements that changed, as recorded by the training.</p>",
        legend(scale, lambda value: f"{value:.3g}"),
        *(change_map(grid, scale, numbers) for grid in recorded),
        "</section>",
    ]


def _unchanged_kinds(grids: Iterable[Grid]) -> str:
    same = [
        f"{grid.stack}.*.{kind}"
        for grid in grids
        for kind in grid.kinds
        if kind not in grid.changed_kinds
    ]
    return f"<p>Unchanged in every layer: {_listed(same, 40)}.</p>" if same else ""


def _listed(names: Sequence[str], limit: int) -> str:
    more = f" and {len(names) - limit:,} more" if len(names) > limit else ""
    return ", ".join(f"<code>{text(name)}</code>" for name in names[:limit]) + more


def _singles(cells: Sequence[Cell]) -> str:
    changed = [cell for cell in cells if cell.nnz]
    rows = [
        (
            text(cell.names[0]),
            f"{cell.nnz:,}",
            f"{cell.numel:,}",
            percent(cell.density),
            "?" if cell.mean_change is None else f"{cell.mean_change:.2g}",
        )
        for cell in changed[:MAX_TENSOR_ROWS]
    ]
    head = ("tensor", "changed", "of", "density", "mean |change|")
    title = "Outside the layers"
    return f"<h2>{title}</h2>{_table(title, head, rows, len(changed))}" if rows else ""


# ---- tables


def _table(
    title: str, head: Sequence[str], rows: Sequence[Sequence[str]], n_all: int, *, look: str = ""
) -> str:
    """Return a table that scrolls where it is too wide.

    Args:
        title: what a screen reader calls the table; of one table of a page only.
        head: titles of the columns.
        rows: cells, escaped.
        n_all: number of rows that there are; those that are missing in ``rows`` are counted below.
        look: class of the table; "texts" if its second column is text.
    """
    titles = "".join(f'<th scope="col">{title}</th>' for title in head)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    more = f"<p>{n_all - len(rows):,} more are not listed.</p>" if n_all > len(rows) else ""
    return (
        f'<div class="wide" role="region" tabindex="0" aria-label="table: {title}">'
        f'<table class="{look}"><thead><tr>{titles}'
        f"</tr></thead><tbody>{body}</tbody></table></div>{more}"
    )


def _fact_table(rows: Iterable[tuple[str, str]]) -> str:
    body = "".join(f'<tr><th scope="row">{name}</th><td>{value}</td></tr>' for name, value in rows)
    return f'<table class="facts">{body}</table>'


def _files(found: Inspection) -> str:
    n_tensors = Counter(tensor.file for tensor in found.tensors)
    rows = [
        (text(file.path), f"{n_tensors[file.path]:,} tensors", "")
        for file in found.weight_files[:MAX_FILE_ROWS]
    ]
    rows += [
        (
            text(file.path),
            "in the delta" if file.stored else "taken from the base",
            size(file.n_bytes),
        )
        for file in found.side_files[:MAX_FILE_ROWS]
    ]
    rows += [(text(path), "empty folder", "") for path in found.empty_folders[:MAX_FILE_ROWS]]
    n_all = len(found.weight_files) + len(found.side_files) + len(found.empty_folders)
    title, head = "Files of the target", ("file", "content", "size")
    return f"<h2>{title}</h2>{_table(title, head, rows, n_all, look='texts')}"


def _sizes(found: Inspection) -> str:
    sizes = found.sizes
    parts = [
        ("positions of changes", sizes.index_bytes),
        ("values of changes", sizes.value_bytes),
        ("files", sizes.side_file_bytes),
        ("headers of weight files", sizes.stored_header_bytes),
        ("manifest", sizes.manifest_bytes),
        ("header", sizes.header_bytes),
        ("whole delta", sizes.file_bytes),
    ]
    rows = [
        (what, size(n), percent(n / sizes.file_bytes) if sizes.file_bytes else "")
        for what, n in parts
        if n
    ]
    title = "What the bytes are"
    return f"<h2>{title}</h2>{_table(title, ('part', 'size', 'share'), rows, len(rows))}"


def _tensor_table(found: Inspection) -> str:
    touched = [tensor for tensor in found.tensors if tensor.state != "unchanged"]
    rows = [
        (
            text(tensor.name),
            text(tensor.state),
            text(tensor.dtype),
            " × ".join(map(str, tensor.shape)),
            f"{tensor.nnz:,}",
            percent(tensor.density),
            size(tensor.payload_bytes),
        )
        for tensor in touched[:MAX_TENSOR_ROWS]
    ]
    head = ("tensor", "state", "dtype", "shape", "changed", "density", "coded")
    return (
        f"<h2>Tensors</h2><details><summary>{len(touched):,} touched</summary>"
        f"{_table('Tensors', head, rows, len(touched), look='texts')}</details>"
    )


# ---- how it was made


def _curve_section(info: Any) -> list[str]:
    points = curve_points(info)
    if len(points) < 2:
        return []
    first, last = points[0], points[-1]
    caption = f"From {first[1]:.4g} to {last[1]:.4g} in {last[0]:,} steps."
    return ["<h2>Loss</h2>", f"<p>{caption}</p>", curve(points)]


def _scores_section(info: Any) -> list[str]:
    scores = recorded_scores(info)
    if scores is None:
        return []
    before = "base" if scores.before_step == 0 else f"step {scores.before_step:,}"
    rows = [
        (text(name), f"{old:.4g}", f"{new:.4g}", f"{new - old:+.3g}")
        for name, old, new in scores.values
    ]
    head = ("score", before, f"step {scores.after_step:,}", "difference")
    title = "Evaluation"
    return [f"<h2>{title}</h2>", _table(title, head, rows[:MAX_FILE_ROWS], len(rows))]


def _settings(found: Inspection) -> str:
    flat = dict(_flatten("", {k: v for k, v in found.info.items() if k not in _DRAWN}))
    rows = [(text(name), text(_short(value))) for name, value in flat.items()]
    rows += [
        ("base fingerprint", f"<code>{text(found.base_fingerprint)}</code>"),
        ("target fingerprint", f"<code>{text(found.target_fingerprint or 'not known')}</code>"),
    ]
    return f"<h2>How it was made</h2>{_fact_table(rows)}"


def _short(value: Any) -> str:
    is_list = isinstance(value, Sequence) and not isinstance(value, str)
    shown = ", ".join(map(str, value)) or "none" if is_list else str(value)
    return shown if len(shown) <= 300 else shown[:300] + " …"


def _flatten(prefix: str, value: Any) -> Iterable[tuple[str, object]]:
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _flatten(f"{prefix}.{key}" if prefix else key, inner)
    else:
        yield prefix, value

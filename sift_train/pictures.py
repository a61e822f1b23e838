"""Draws where a run changed the model, and its loss curve, as PNG; needs matplotlib."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import sparsedelta

COLOUR = "#1565c0"


@dataclass(frozen=True)
class _Measure:
    """The quantity that the colour of a cell shows: its value, its title, and its text form."""

    value_of: Callable[[Any], float | None]
    title: str
    text_of: Callable[[float], str]


_DENSITY = _Measure(
    lambda cell: float(cell.density), "share of elements that changed", lambda share: f"{share:.2%}"
)
_CHANGE = _Measure(
    lambda cell: 0.0 if not cell.nnz else cell.mean_change,
    "mean |change| of the elements that changed",
    lambda mean: f"{mean:.2g}",
)


def density_map(delta: str | PathLike[str], png: str | PathLike[str]) -> Path:
    """Draw the share of changed elements, by layer and kind of tensor; return the path.

    Args:
        delta: path of a delta.
        png: path of the picture; an existing file is replaced.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: none of the delta's tensors belongs to a layer.
    """
    touched = [grid for grid in sparsedelta.inspect(delta).layers if grid.changed_kinds]
    if not touched:
        raise ValueError(f"'{delta}' changes nothing in numbered layers; there is nothing to draw")
    return _draw_grids(touched, _DENSITY, png)


def change_map(delta: str | PathLike[str], png: str | PathLike[str]) -> Path:
    """Draw the mean |change| of changed elements, by layer and kind of tensor; return the path.

    Args:
        delta: path of a delta with ``mean_change`` in its info, as ``fit`` and ``export_delta``
            with a ``sift`` write it.
        png: path of the picture; an existing file is replaced.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the delta records ``mean_change`` for no layer.
    """
    recorded = [grid for grid in sparsedelta.inspect(delta).layers if grid.has_mean_change]
    if not recorded:
        raise ValueError(
            f"'{delta}' does not record how far elements of numbered layers moved; "
            "there is nothing to draw"
        )
    return _draw_grids(recorded, _CHANGE, png)


def loss_curve(source: str | PathLike[str] | Sequence[float], png: str | PathLike[str]) -> Path:
    """Draw the loss by step; return the path.

    Args:
        source: path of a delta that records losses, or the losses, one per step, as in
            ``FitResult``.
        png: path of the picture; an existing file is replaced.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the delta records no losses.
    """
    if isinstance(source, str | PathLike):
        points = sparsedelta.inspect(source).losses
    else:
        points = [(number, loss) for number, loss in enumerate(source, 1)]
    if not points:
        raise ValueError("no losses are recorded; there is nothing to draw")
    figure, axis = _figures().subplots(figsize=(7.2, 3.2), layout="constrained")
    axis.plot(*zip(*points, strict=True), color=COLOUR)
    axis.set_xlabel("step")
    axis.set_ylabel("loss")
    axis.set_ylim(bottom=min(0.0, *(loss for _, loss in points)))
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    return _save(figure, png)


def _draw_grids(grids: Sequence[Any], measure: _Measure, png: str | PathLike[str]) -> Path:
    figures = _figures()
    heights = [1.6 + 0.3 * len(grid.layers) for grid in grids]
    width = 3.0 + 0.62 * max(len(grid.changed_kinds) for grid in grids)
    figure, axes = figures.subplots(
        len(grids),
        1,
        figsize=(width, sum(heights) + 1.2),
        squeeze=False,
        gridspec_kw={"height_ratios": heights},
        layout="constrained",
    )
    for grid, (axis,) in zip(grids, axes, strict=True):
        _draw(figure, axis, grid, measure)
    return _save(figure, png)


def _draw(figure: Any, axis: Any, grid: Any, measure: _Measure) -> None:
    kinds = grid.changed_kinds
    cells = [[grid.cells.get((layer, kind)) for kind in kinds] for layer in grid.layers]
    found = [[None if cell is None else measure.value_of(cell) for cell in row] for row in cells]
    rows = [[math.nan if value is None else value for value in row] for row in found]
    image = axis.imshow(rows, cmap="Blues", vmin=0.0, aspect="auto")
    axis.set_xticks(range(len(kinds)), kinds, rotation=60, ha="right", rotation_mode="anchor")
    axis.set_yticks(range(len(grid.layers)), [str(layer) for layer in grid.layers])
    axis.set_ylabel(grid.stack or "layer")
    axis.set_title(measure.title, fontsize=10)
    bar = figure.colorbar(image, ax=axis, fraction=0.05, pad=0.02)
    bar.ax.yaxis.set_major_formatter(lambda value, _: measure.text_of(value))


def _figures() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise ModuleNotFoundError(
            "pictures need matplotlib, which is not installed; install it with:"
            " pip install 'sparsedelta[pictures]'",
            name="matplotlib",
        ) from error

    matplotlib.use("Agg", force=False)
    from matplotlib import pyplot

    return pyplot


def _save(figure: Any, png: str | PathLike[str]) -> Path:
    path = Path(png)
    figure.savefig(path, dpi=150, format="png", metadata={"Software": None})
    _figures().close(figure)
    return path

"""A small PNG of what a delta changes: a row for each kind of tensor, a column for each layer.

It shows the map that comes first on the page of ``inspect --html``, in the colours of that page.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sparsedelta.ops.inspect import Inspection
from sparsedelta.ops.layers import Cell, Grid, by_layer
from sparsedelta.report.scale import Scale

MAX_LAYERS = 256
MAX_KINDS = 48
ROW_PIXELS = 20
_WIDTH = 720  # a picture of many layers is about as wide
_MIN_COLUMN, _MAX_COLUMN = 5, 24

_UNCHANGED = (128, 136, 148, 48)
_NOTHING = (0, 0, 0, 0)
_DENSITY = (0xE3, 0xEE, 0xFA), (0x08, 0x39, 0x7E)  # as in page.css
_CHANGE = (0xFD, 0xF0, 0xDD), (0x6B, 0x1D, 0x04)
_COLOUR_TYPES = {3: 2, 4: 6}  # of PNG, by number of channels


@dataclass(frozen=True, slots=True)
class Picture:
    """What a picture shows.

    Attributes:
        grid: the stack of layers with the most changed elements.
        scale: of the values that the colours show.
        shows_change: whether they are mean |change|; otherwise they are densities.
    """

    grid: Grid
    scale: Scale
    shows_change: bool

    def value(self, cell: Cell) -> float:
        """Return the value of a cell that its colour shows; 0 if the cell is unchanged."""
        return (cell.mean_change or 0.0) if self.shows_change else cell.density


def picture_of(found: Inspection) -> Picture | None:
    """Return the map to draw; None if no element of a layer changed or the map is too large.

    It shows the mean |change| if the densities are nearly equal and the training recorded the changes.
    """
    tensors = (tensor for tensor in found.tensors if tensor.numel)
    grids, _ = by_layer(tensors, found.mean_changes)
    changed = [grid for grid in grids if grid.changed_kinds]
    if not changed:
        return None
    grid = max(changed, key=lambda one: sum(cell.nnz for cell in one.cells.values()))
    if len(grid.layers) > MAX_LAYERS or len(grid.changed_kinds) > MAX_KINDS:
        return None
    density = Scale(cell.density for cell in grid.cells.values())
    if density.is_even and grid.has_mean_change:
        change = Scale(cell.mean_change or 0.0 for cell in grid.cells.values())
        return Picture(grid, change, shows_change=True)
    return Picture(grid, density, shows_change=False)


def render_png(picture: Picture) -> bytes:
    """Return a picture as a PNG with transparent gaps. Cells of unchanged tensors are grey."""
    grid = picture.grid
    colours = [
        [_colour(picture, grid.cells.get((layer, kind))) for layer in grid.layers]
        for kind in grid.changed_kinds
    ]
    return encode_png(_enlarged(np.array(colours, np.uint8)))


def encode_png(pixels: npt.NDArray[np.uint8]) -> bytes:
    """Return an image of shape (height, width, 3 or 4) as a PNG. Equal images give equal bytes."""
    height, width, channels = pixels.shape
    rows = np.concatenate([np.zeros((height, 1), np.uint8), pixels.reshape(height, -1)], axis=1)
    head = struct.pack(">IIBBBBB", width, height, 8, _COLOUR_TYPES[channels], 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(rows.tobytes(), 9)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in chunks)


def _colour(picture: Picture, cell: Cell | None) -> tuple[int, ...]:
    if cell is None:
        return _NOTHING
    value = picture.value(cell)
    if not value:
        return _UNCHANGED
    share = picture.scale.strength(value)
    low, high = _CHANGE if picture.shows_change else _DENSITY
    return *(round(a + share * (b - a)) for a, b in zip(low, high, strict=True)), 255


def _enlarged(cells: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Return the image of cells, (kinds, layers, 4), with a gap of one pixel between them."""
    columns = min(_MAX_COLUMN, max(_MIN_COLUMN, _WIDTH // cells.shape[1]))
    large = cells.repeat(ROW_PIXELS, axis=0).repeat(columns, axis=1)
    large[ROW_PIXELS - 1 :: ROW_PIXELS] = _NOTHING
    large[:, columns - 1 :: columns] = _NOTHING
    return large


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

"""A small PNG of where a delta changes a model: a row for each layer, a column for each kind of tensor."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import numpy.typing as npt

from sparsedelta.ops.inspect import Inspection
from sparsedelta.ops.layers import Grid, by_layer

CELL_PIXELS = 16
MAX_LAYERS = 256
MAX_KINDS = 48

_UNCHANGED = np.array([238, 238, 242], np.float64)
_LOW = np.array([198, 219, 239], np.float64)
_HIGH = np.array([8, 48, 107], np.float64)
_WHITE = 255


def changed_grid(found: Inspection) -> Grid | None:
    """Return the stack of layers with the most changed elements; None if none changed or it is too large."""
    grids, _ = by_layer(tensor for tensor in found.tensors if tensor.numel)
    changed = [grid for grid in grids if grid.changed_kinds]
    if not changed:
        return None
    grid = max(changed, key=lambda one: sum(cell.nnz for cell in one.cells.values()))
    small = len(grid.layers) <= MAX_LAYERS and len(grid.changed_kinds) <= MAX_KINDS
    return grid if small else None


def render_png(grid: Grid) -> bytes:
    """Return a grid as a PNG. Changed tensors are blue, darker with density (square-root scale).

    Unchanged tensors are grey. A cell without a tensor is white.
    """
    density = np.full((len(grid.layers), len(grid.changed_kinds)), np.nan)
    for row, layer in enumerate(grid.layers):
        for column, kind in enumerate(grid.changed_kinds):
            if cell := grid.cells.get((layer, kind)):
                density[row, column] = cell.density
    share = np.sqrt(np.nan_to_num(density) / np.nanmax(density))[..., None]
    colours = np.where(share > 0, _LOW + share * (_HIGH - _LOW), _UNCHANGED)
    pixels = np.where(np.isnan(density)[..., None], _WHITE, colours).astype(np.uint8)
    return encode_png(_as_grid(pixels))


def encode_png(pixels: npt.NDArray[np.uint8]) -> bytes:
    """Return an image of shape (height, width, 3) as a PNG. Equal images give equal bytes."""
    height, width, _ = pixels.shape
    rows = np.concatenate([np.zeros((height, 1), np.uint8), pixels.reshape(height, -1)], axis=1)
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows.tobytes(), 9)),
        (b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in chunks)


def _as_grid(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    large = pixels.repeat(CELL_PIXELS, axis=0).repeat(CELL_PIXELS, axis=1)
    large[CELL_PIXELS - 1 :: CELL_PIXELS] = _WHITE
    large[:, CELL_PIXELS - 1 :: CELL_PIXELS] = _WHITE
    return large


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

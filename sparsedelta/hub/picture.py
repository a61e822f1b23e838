"""Where a delta changed a model, as a small PNG: a row for each layer, a column for each kind of tensor."""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sparsedelta._inspect import Inspection

CELL_PIXELS = 16
MAX_LAYERS = 256
MAX_KINDS = 48

_LAYER = re.compile(r"(?:^|\.)(\d+)\.(.+)$")
_EMPTY = np.array([238, 238, 242], np.float64)
_LOW = np.array([198, 219, 239], np.float64)
_HIGH = np.array([8, 48, 107], np.float64)
_GAP = np.array([255, 255, 255], np.uint8)


@dataclass(frozen=True)
class DensityMap:
    """Density of the changes by layer and kind of tensor.

    Attributes:
        layers: their numbers.
        kinds: names of tensors without what stands before the layer's number.
        density: shape (layers, kinds), of each cell; NaN where there is no such tensor.
    """

    layers: tuple[int, ...]
    kinds: tuple[str, ...]
    density: npt.NDArray[np.float64]


def density_map(found: Inspection) -> DensityMap | None:
    """Return the map of a delta; None if it changes no tensors of numbered layers, or of too many."""
    cells: dict[tuple[int, str], tuple[int, int]] = {}
    changed = set()
    for tensor in found.tensors:
        place = _LAYER.search(tensor.name)
        if place and tensor.numel and tensor.state != "removed":
            key = int(place[1]), place[2]
            nnz, numel = cells.get(key, (0, 0))
            cells[key] = nnz + tensor.nnz, numel + tensor.numel
            if tensor.nnz:
                changed.add(place[2])
    layers = sorted({layer for layer, _ in cells})
    kinds = [kind for kind in dict.fromkeys(kind for _, kind in cells) if kind in changed]
    if not kinds or len(layers) > MAX_LAYERS or len(kinds) > MAX_KINDS:
        return None
    density = np.full((len(layers), len(kinds)), np.nan)
    for (layer, kind), (nnz, numel) in cells.items():
        if kind in changed:
            density[layers.index(layer), kinds.index(kind)] = nnz / numel
    return DensityMap(tuple(layers), tuple(kinds), density)


def render_png(shown: DensityMap) -> bytes:
    """Return the map as a PNG: pale to dark blue by density (root scale), grey: unchanged, white: none."""
    highest = float(np.nanmax(shown.density))
    share = np.sqrt(np.nan_to_num(shown.density) / highest)[..., None]
    colours = _LOW + share * (_HIGH - _LOW)
    colours = np.where(share > 0, colours, _EMPTY)
    pixels = np.where(np.isnan(shown.density)[..., None], 255, colours).astype(np.uint8)
    return encode_png(_as_grid(pixels))


def encode_png(pixels: npt.NDArray[np.uint8]) -> bytes:
    """Return an image of shape (height, width, 3) as a PNG, the same bytes for the same image."""
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
    large[CELL_PIXELS - 1 :: CELL_PIXELS] = _GAP
    large[:, CELL_PIXELS - 1 :: CELL_PIXELS] = _GAP
    return large


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def numbered(kinds: Sequence[str]) -> str:
    """Return the names of the columns, numbered from the left."""
    return ", ".join(f"{number} `{kind}`" for number, kind in enumerate(kinds, 1))

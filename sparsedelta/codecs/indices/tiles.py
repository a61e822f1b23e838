"""``tiles``: rows and columns grouped into bands by their density (FORMAT §6.6).

Gradients are large in a few rows and columns. If training chooses elements by gradient, most of them are there. A tile consists
of the cells in a band of rows and a band of columns. Each tile is coded by its own density.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from sparsedelta.codecs import kernels
from sparsedelta.codecs.bitpack import (
    MAX_LOW_BITS,
    Numbers,
    best_low_bits,
    decode_rice,
    encode_rice,
    read_number,
    write_number,
)
from sparsedelta.codecs.context import NO_CONTEXT, ChunkContext, Positions, Sizes, Stream
from sparsedelta.codecs.exponent_classes import (
    N_KEYS,
    choice_bits,
    class_table,
    merge_keys,
    total_choice_bits,
)
from sparsedelta.codecs.indices.contract import IndexEncoding
from sparsedelta.codecs.subsets import SubsetHead, encode_subset, read_subset
from sparsedelta.errors import Corrupt

MAX_BANDS = 16
_KEYS_PER_OCTAVE = 2
_TILE_BITS = 24  # size of what a tile needs besides its gaps
_BAND_BITS = (
    2 * _TILE_BITS
)  # one more band adds as many tiles as there are bands in the other direction
# Tiles are used if they shrink the stream at least to this ratio. Otherwise they are not worth the time.
_WORTH = 0.97
# Lines whose numbers of touched cells vary less than this (variance, relative to the squared mean) save less than that.
_LEAST_VARIANCE = 0.1
_LINE_SAMPLE, _FEWEST_SAMPLED = 4, 1 << 14  # touched cells of a sample: for each line; at least
_CELLS = 1 << 20  # touched cells whose rows and columns are in memory at the same time

Labels = npt.NDArray[np.uint32]  # the band of each row or column


class _Tiles(IndexEncoding):
    """Touched positions as places within tiles."""

    def is_quick(self, nnz: int, span: int) -> bool:
        return False

    def worth_trying(self, nnz: int, span: int) -> bool:
        return 64 <= nnz < span

    def encode(
        self, positions: Positions, span: int, context: ChunkContext = NO_CONTEXT
    ) -> Stream | None:
        columns, first = context.columns, context.first
        if not 2 <= columns <= span:
            return None
        n_rows = _n_rows(columns, first, span)
        in_rows, in_columns = np.zeros(n_rows, np.int64), np.zeros(columns, np.int64)
        for _, row, column in _cells(positions, columns, first):
            top, bottom = int(row[0]), int(row[-1])
            in_rows[top : bottom + 1] += np.bincount(row - row[0])
            in_columns += np.bincount(column, minlength=columns)
        rows, lines = _choose_bands(in_rows, columns), _choose_bands(in_columns, n_rows)
        if not (rows.any() or lines.any()):
            return None
        grid, places = _Grid(rows, lines), np.empty(len(positions), np.uint32)
        for some, row, column in _cells(positions, columns, first):
            places[some] = grid.places(row, column)
        places = _sorted(places, int(grid.edges[-1]))
        edges = grid.edges.astype(np.uint32)  # because otherwise searchsorted copies the places
        counts = np.diff(np.searchsorted(places, edges))
        if not _is_worth_it(grid, counts):
            return None
        head = bytearray(write_number(columns) + write_number(first))
        sequences: list[tuple[Numbers, int]] = []
        for labels, n_bands in zip(grid.labels, grid.shape, strict=True):
            k = best_low_bits(labels)
            head += bytes([n_bands, k])
            sequences.append((labels, k))
        start = 0
        for n, area, edge in zip(counts.tolist(), grid.areas.tolist(), grid.edges, strict=False):
            part, sequence = encode_subset(places[start : start + n] - np.uint32(edge), area)
            head += part
            sequences.append(sequence)
            start += n
        return np.frombuffer(bytes(head) + encode_rice(sequences), np.uint8)

    def possible(self, n_bytes: Sizes, nnz: Sizes, span: Sizes) -> Sizes:
        return (n_bytes >= 8) & (n_bytes <= span // 4 + (1 << 15))

    def decode(
        self, stream: bytes, nnz: int, span: int, context: ChunkContext = NO_CONTEXT
    ) -> Positions:
        columns, at = read_number(stream, 0)
        first, at = read_number(stream, at)
        if not (2 <= columns <= span and first < columns):
            raise Corrupt(f"index stream has {columns} columns and begins in column {first}")
        n_tiles, lengths = 1, []
        for n in (_n_rows(columns, first, span), columns):
            n_bands, at = read_number(stream, at)
            k, at = read_number(stream, at)
            if not 1 <= n_bands <= MAX_BANDS or k > MAX_LOW_BITS:
                raise Corrupt(f"index stream has {n_bands} bands with parameter {k}")
            n_tiles *= n_bands
            lengths.append((n, k, n_bands))
        heads = []
        for _ in range(n_tiles):
            head, at = read_subset(stream, at)
            heads.append(head)
        sequences = decode_rice(
            stream[at:], [(n, k) for n, k, _ in lengths] + [head.length for head in heads]
        )
        for labels, (_, _, n_bands) in zip(sequences, lengths, strict=False):
            if int(labels.max()) >= n_bands:
                raise Corrupt(f"index stream puts a line into band {labels.max()} of {n_bands}")
        grid = _Grid(sequences[0], sequences[1], (lengths[0][2], lengths[1][2]))
        if kernels.native:
            return _joined(grid, columns, first, span, nnz, heads, sequences[2:])
        parts, left = [], nnz
        for number, (head, gaps) in enumerate(zip(heads, sequences[2:], strict=True)):
            chosen = head.chosen(gaps, int(grid.areas[number]))
            left -= len(chosen)
            if left < 0:
                break
            if len(chosen):
                row, column = grid.cells(number, chosen)
                parts.append(row * np.int64(columns) + column)
        if left:
            raise Corrupt(f"index stream does not hold exactly {nnz} positions")
        cells = np.concatenate(parts)
        # Stable sort is Timsort. It only merges here, because the cells of each tile are sorted already.
        cells.sort(kind="stable")
        cells -= first
        if cells[0] < 0 or cells[-1] >= span:
            raise Corrupt(f"index stream leaves its span of {span} elements")
        return cells.astype(np.uint32)


def _joined(
    grid: _Grid,
    columns: int,
    first: int,
    span: int,
    nnz: int,
    heads: Sequence[SubsetHead],
    sequences: Sequence[Numbers],
) -> Positions:
    """Return the positions in the tiles; needs the compiled kernels."""
    touched, positions = np.zeros(-(-span // 8), np.uint8), np.empty(nnz, np.uint32)
    kernel: Any = kernels.native
    for number, (head, gaps) in enumerate(zip(heads, sequences, strict=True)):
        places = head.chosen(gaps, int(grid.areas[number]))
        if len(places):
            kernel.put_cells(places, *grid.lines(number), columns, first, span, touched)
    if kernel.ones(touched, positions) != nnz:
        raise Corrupt(f"index stream does not hold exactly {nnz} positions")
    return positions


class _Grid:
    """Rows and columns in bands. Cells are ordered by tile, and row by row within a tile."""

    def __init__(
        self, row_labels: Labels, column_labels: Labels, shape: tuple[int, int] | None = None
    ) -> None:
        self.labels = (row_labels, column_labels)
        self.shape = shape or (int(row_labels.max()) + 1, int(column_labels.max()) + 1)
        self._counts = [
            np.bincount(labels, minlength=n)
            for labels, n in zip(self.labels, self.shape, strict=True)
        ]
        self._orders = [np.argsort(labels, kind="stable") for labels in self.labels]
        self._starts = [np.cumsum(counts) - counts for counts in self._counts]
        self.areas = np.outer(*self._counts).ravel()  # of the tiles
        self.edges = np.concatenate([[0], np.cumsum(self.areas)])  # of the tiles, in their order

    def places(self, row: Numbers, column: Numbers) -> npt.NDArray[np.int64]:
        """Return the places of cells in the order of tiles."""
        band, other = self.labels[0][row], self.labels[1][column]
        places: npt.NDArray[np.int64] = self.edges[band * np.uint32(self.shape[1]) + other]
        places += self._ranks[0][row] * self._counts[1][other]
        places += self._ranks[1][column]
        return places

    def cells(self, number: int, places: Numbers) -> tuple[npt.NDArray[np.int64], ...]:
        """Return rows and columns of places within a tile."""
        rows, columns = self.lines(number)
        row, column = np.divmod(places, np.uint32(len(columns)))
        return rows[row], columns[column]

    def lines(self, number: int) -> list[npt.NDArray[np.int64]]:
        """Return the rows and the columns of a tile."""
        bands = divmod(number, self.shape[1])
        parts = zip(bands, self._orders, self._starts, self._counts, strict=True)
        return [order[starts[i] : starts[i] + counts[i]] for i, order, starts, counts in parts]

    @cached_property
    def _ranks(self) -> list[npt.NDArray[np.int64]]:
        """For rows and columns: the number of earlier lines in the same band."""
        found = []
        for labels, order, starts in zip(self.labels, self._orders, self._starts, strict=True):
            ranks = np.empty(len(labels), np.int64)
            ranks[order] = np.arange(len(order)) - starts[labels[order]]
            found.append(ranks)
        return found


def may_be_smaller(positions: Positions, span: int, context: ChunkContext) -> bool:
    """Return whether ``tiles`` may be smaller than encodings without bands, as far as a sample of the positions shows."""
    columns, first = context.columns, context.first
    if not 2 <= columns <= span:
        return False
    n_rows = _n_rows(columns, first, span)
    step = max(1, len(positions) // max(_LINE_SAMPLE * (n_rows + columns), _FEWEST_SAMPLED))
    row, column = np.divmod(positions[::step] + np.uint32(first), np.uint32(columns))
    for line, n_lines in ((row, n_rows), (column, columns)):
        counts = np.bincount(line, minlength=n_lines)
        mean = float(counts.mean())
        # Chance alone gives a variance of the mean.
        if float(counts.var()) - mean > _LEAST_VARIANCE * mean * mean:
            return True
    return False


def _cells(
    positions: Positions, columns: int, first: int
) -> Iterator[tuple[slice, Numbers, Numbers]]:
    """Yield some of the positions at a time, with their rows and columns, so that temporary arrays stay small."""
    size = max(_CELLS, columns)
    for start in range(0, len(positions), size):
        part = slice(start, start + size)
        cells = positions[part] + np.uint32(first)
        row = cells // np.uint32(columns)  # np.divmod takes four times as long
        yield part, row, cells - row * np.uint32(columns)


def _sorted(places: Numbers, n_cells: int) -> Numbers:
    """Return distinct places in ascending order."""
    if kernels.native is None:
        places.sort()
        return places
    bits = np.zeros(-(-n_cells // 8), np.uint8)
    kernels.native.put_bits(places, bits)
    kernels.native.ones(bits, places)
    return places


def _n_rows(columns: int, first: int, span: int) -> int:
    return -(-(first + span) // columns)


def _choose_bands(counts: npt.NDArray[np.int64], n_across: int) -> Labels:
    """Return a band for each line, given the number of touched cells of its ``n_across`` cells.

    The most frequent band is number 0, because labels are stored as Rice codes. If the lines have similar
    densities, all are in band 0.
    """
    keys = np.round(_KEYS_PER_OCTAVE * (1 + np.log2(counts + 0.5))).astype(np.int64)
    lines = np.bincount(keys, minlength=N_KEYS)
    touched = np.bincount(keys, counts, minlength=N_KEYS).astype(np.int64)
    untouched = lines * n_across - touched
    together = choice_bits(int(untouched.sum()), int(touched.sum()))
    if total_choice_bits(untouched, touched) > _WORTH * together:
        return np.zeros(len(counts), np.uint32)

    def cost(untouched: float, touched: float, n_lines: float) -> float:
        return choice_bits(untouched, touched) + n_lines * math.log2(len(counts) / n_lines)

    statistics = (untouched, touched, lines)
    thresholds = merge_keys(statistics, cost, most=MAX_BANDS, overhead=_BAND_BITS)
    labels = class_table(thresholds)[keys]
    order = np.argsort(-np.bincount(labels), kind="stable")
    renamed: Labels = np.argsort(order).astype(np.uint32)[labels]
    return renamed


def _is_worth_it(grid: _Grid, counts: npt.NDArray[np.int64]) -> bool:
    untouched = grid.areas - counts
    apart = total_choice_bits(untouched, counts) + _TILE_BITS * len(counts)
    for labels in grid.labels:
        n = np.bincount(labels)
        apart += float((n * np.log2(len(labels) / np.maximum(n, 1))).sum())
    return apart < _WORTH * choice_bits(int(untouched.sum()), int(counts.sum()))


TILES = _Tiles()

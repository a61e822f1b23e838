"""A tensor merged from the changes of several deltas, computed window by window while it is read.

Memory is at most one window of the base and the changes in it. Methods that keep the largest changes
also need the magnitudes of one delta's changes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from sparsedelta.codecs.chunk import MAX_SPAN, touched_digest
from sparsedelta.codecs.indices import Positions
from sparsedelta.codecs.values import VALUE_ENCODINGS, Bits
from sparsedelta.format.records import TensorSpec
from sparsedelta.ops.merging.floats import Numbers, to_bits, to_numbers, work_dtype
from sparsedelta.ops.merging.recipe import Recipe, dropped_at_random, kept_largest
from sparsedelta.ops.stacking.fold import Link
from sparsedelta.tensors.changes import ChangeReader
from sparsedelta.tensors.compare import Source
from sparsedelta.tensors.parallel import Pace
from sparsedelta.tensors.rebuild import check_touched
from sparsedelta.tensors.start import read_start

_BLOCK_ELEMENTS = 1 << 20
_SMALLEST_NORM = 1e-7  # differences with a smaller Σ |d| are not scaled up


@dataclass(slots=True)
class _Thinned:
    """Which of one delta's differences the recipe keeps, and how they are scaled.

    Attributes:
        number: number of the delta, from 0.
        changes: reads the changes of the delta.
        factor: factor for the differences that are kept.
        least: the smallest magnitude that is kept; None if the magnitude does not matter.
        n_least: how many more differences of exactly that magnitude are kept.
    """

    number: int
    changes: ChangeReader
    factor: float = 1.0
    least: np.floating[Any] | None = None
    n_least: int = 0


class MergedTensor:
    """The base tensor with the merged changes of several deltas (a ``Source``).

    It is computed when it is read, one window of ``MAX_SPAN`` elements at a time.

    Args:
        base: the base tensor. All targets must have its dtype and shape.
        links: the changes of each delta; None for a delta that changes nothing.
        recipe: how the changes are merged.
        pace: receives the number of coded bytes read.
    """

    def __init__(
        self, base: Source, links: Sequence[Link | None], recipe: Recipe, pace: Pace
    ) -> None:
        self.file = base.file
        self.name = base.name
        self.spec: TensorSpec = base.spec
        self._base = base
        self._recipe = recipe
        self._pace = pace
        self._n_elements = base.spec.n_elements
        self._dtype = base.spec.dtype
        self._n_deltas = len(links)
        self._number, self._raw = -1, memoryview(b"")
        self._thinned = [
            self._thin(number, ChangeReader(link.row, link.payload, pace, base))
            for number, link in enumerate(links)
            if link
        ]

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` with the tensor's bytes from ``offset``."""
        window_bytes = MAX_SPAN * self._dtype.width
        while len(buffer):
            number, start = divmod(offset, window_bytes)
            if number != self._number:
                bits = self._merge_window(number)
                self._raw, self._number = bits.view(np.uint8).data, number
            raw = self._raw[start : start + len(buffer)]
            buffer[: len(raw)] = raw
            buffer = buffer[len(raw) :]
            offset += len(raw)

    def _merge_window(self, number: int) -> Bits:
        """Return the merged bits of a window."""
        bits = self._read(number)
        found = [
            (thinned.number, positions, self._thinned_out(thinned, number, values))
            for thinned in self._thinned
            for positions, values in self._differences(thinned.changes, number, bits)
        ]
        for start in range(0, len(bits), _BLOCK_ELEMENTS):
            self._merge_block(bits, found, start, min(start + _BLOCK_ELEMENTS, len(bits)))
        return bits

    def _merge_block(
        self, bits: Bits, found: Sequence[tuple[int, Positions, Numbers]], start: int, end: int
    ) -> None:
        touched = np.zeros(end - start, np.bool_)
        parts = found
        if end - start < len(bits):
            parts = [_within(one, start, end) for one in found]
        for _, where, _ in parts:
            touched[where] = True
        (union,) = touched.nonzero()
        if not len(union):
            return
        work = np.zeros((self._n_deltas, len(union)), work_dtype(self._dtype))
        for number, where, values in parts:
            # If one delta touches all, no search is needed.
            places = slice(None) if len(where) == len(union) else union.searchsorted(where)
            work[number, places] = values
        with np.errstate(invalid="ignore", over="ignore"):
            merged = self._recipe.merge(work)
            before = bits[start:end][union]
            after = to_bits(self._dtype, to_numbers(self._dtype, before) + merged)
        bits[start:end][union] = np.where(merged == 0, before, after)

    def _read(self, number: int) -> Bits:
        """Return the base's bits of a window."""
        first = number * MAX_SPAN
        bits: Bits = np.empty(min(MAX_SPAN, self._n_elements - first), self._dtype.view)
        read_start(self._base, self._n_elements, first, bits)
        return bits

    def _differences(
        self, changes: ChangeReader, number: int, bits: Bits
    ) -> Iterator[tuple[Positions, Numbers]]:
        """Yield one pair: all positions and differences of a delta in a window; nothing if it has none."""
        pieces = changes.window(number * MAX_SPAN, len(bits))
        if not pieces:
            return
        positions = _joined([piece.positions for piece in pieces])
        before = [bits[piece.positions] for piece in pieces]
        after = [
            VALUE_ENCODINGS[piece.values].decode(self._dtype, old, piece.codes)
            for piece, old in zip(pieces, before, strict=True)
        ]
        for piece, *bits_of in zip(pieces, before, after, strict=True):
            if piece.touched:
                one, other = map(touched_digest, bits_of)
                check_touched(changes.row, self._base, self._pace, piece.touched, (one, other))
        with np.errstate(invalid="ignore", over="ignore"):
            new, old = (
                to_numbers(self._dtype, _joined(after)),
                to_numbers(self._dtype, _joined(before)),
            )
            yield positions, new - old

    def _thin(self, number: int, changes: ChangeReader) -> _Thinned:
        """Return which differences of a delta the recipe keeps; this reads all of them."""
        density = self._recipe.densities[number]
        thinned = _Thinned(number, changes)
        if density == 1:
            return thinned
        if not self._recipe.drops_at_random:
            n_kept = self._recipe.n_kept(number, self._n_elements)
            if n_kept < changes.row.nnz:
                magnitudes = np.concatenate([np.abs(v) for _, v in self._all(changes)])
                thinned.least, thinned.n_least = kept_largest(magnitudes, n_kept)
            return thinned
        norm = kept_norm = 0.0
        for window, values in self._all(changes):
            magnitudes = np.abs(values)
            norm += float(magnitudes.sum(dtype=np.float64))
            magnitudes[self._dropped(thinned, window, len(values))] = 0
            kept_norm += float(magnitudes.sum(dtype=np.float64))
        if norm >= _SMALLEST_NORM and kept_norm >= _SMALLEST_NORM:
            thinned.factor = norm / kept_norm
        return thinned

    def _all(self, changes: ChangeReader) -> Iterator[tuple[int, Numbers]]:
        for number in range(-(-self._n_elements // MAX_SPAN)):
            for _, values in self._differences(changes, number, self._read(number)):
                yield number, values

    def _thinned_out(self, thinned: _Thinned, number: int, values: Numbers) -> Numbers:
        """Return the differences of a window: those not kept are set to 0, the others are scaled."""
        if thinned.least is not None:
            magnitudes = np.abs(values)
            equal = np.flatnonzero(magnitudes == thinned.least)
            values[magnitudes < thinned.least] = 0
            values[equal[thinned.n_least :]] = 0
            thinned.n_least -= min(thinned.n_least, len(equal))
        elif self._recipe.drops_at_random and self._recipe.densities[thinned.number] < 1:
            values[self._dropped(thinned, number, len(values))] = 0
            values *= values.dtype.type(thinned.factor)
        return values

    def _dropped(self, thinned: _Thinned, number: int, n_elements: int) -> npt.NDArray[np.bool_]:
        what = f"{self._recipe.seed} {thinned.number} {number} {self.name}"
        key = blake3(what.encode("utf-8")).digest()[:16]
        return dropped_at_random(key, self._recipe.densities[thinned.number], n_elements)


def _joined(parts: Sequence[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _within(
    part: tuple[int, Positions, Numbers], start: int, end: int
) -> tuple[int, Positions, Numbers]:
    """Return the differences at the positions from ``start`` to ``end``, counted from ``start``."""
    number, positions, values = part
    low, high = np.searchsorted(positions, [start, end])
    return number, positions[low:high] - np.uint32(start), values[low:high]

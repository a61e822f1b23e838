"""One tensor of several deltas merged in float, made chunk by chunk while it is read.

Memory stays within one chunk of the base, the changes of one chunk and, where the largest changes are
chosen, the magnitudes of one delta's changes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from sparsedelta.codecs.indices import Positions
from sparsedelta.codecs.values import VALUE_ENCODINGS, Bits
from sparsedelta.format.records import TensorSpec
from sparsedelta.ops.merging.floats import Numbers, to_bits, to_numbers, work_dtype
from sparsedelta.ops.merging.recipe import Recipe, dropped_at_random, kept_largest
from sparsedelta.tensors.changes import Stage
from sparsedelta.tensors.compare import Source
from sparsedelta.tensors.parallel import Pace
from sparsedelta.tensors.sources import Made, read_chunk

_BLOCK_ELEMENTS = 1 << 20
_SMALLEST_NORM = 1e-7  # below it nothing is scaled up


@dataclass(slots=True)
class _Thinned:
    """One delta's differences of the tensor, thinned out as the recipe has it.

    Attributes:
        number: of the delta, from 0.
        stage: its change of the tensor.
        factor: by which what is left is scaled up.
        least: the smallest magnitude that is kept; None: all are.
        n_least: how many of that magnitude are still to be kept.
    """

    number: int
    stage: Stage
    factor: float = 1.0
    least: np.floating[Any] | None = None
    n_least: int = 0


class MergedTensor(Made):
    """The base's tensor with the merged changes of several deltas.

    Args:
        spec: the tensor, in the base and so in all targets.
        base: where its bytes are.
        stages: the change that each delta makes, None where it makes none.
        recipe: how they are merged.
        pace: told of every coded byte.
    """

    def __init__(
        self,
        spec: TensorSpec,
        base: Source,
        stages: Sequence[Stage | None],
        recipe: Recipe,
        pace: Pace,
    ) -> None:
        super().__init__(base.name, spec)
        self._base = base
        self._recipe = recipe
        self._pace = pace
        self._n_deltas = len(stages)
        self._thinned = [self._thin(number, stage) for number, stage in enumerate(stages) if stage]

    def make(self, number: int) -> Bits:
        """Return the bits of a chunk."""
        bits = self._read(number)
        found = [
            (thinned.number, positions, self._thinned_out(thinned, number, values))
            for thinned in self._thinned
            for positions, values in self._differences(thinned.stage, number, bits)
        ]
        for start in range(0, len(bits), _BLOCK_ELEMENTS):
            self._merge_block(bits, found, start, min(start + _BLOCK_ELEMENTS, len(bits)))
        return bits

    def _merge_block(
        self, bits: Bits, found: Sequence[tuple[int, Positions, Numbers]], start: int, end: int
    ) -> None:
        touched = np.zeros(end - start, np.bool_)
        parts = []
        for number, positions, values in found:
            low, high = np.searchsorted(positions, [start, end])
            where = positions[low:high] - np.uint32(start)
            touched[where] = True
            parts.append((number, where, values[low:high]))
        union = np.flatnonzero(touched)
        if not len(union):
            return
        work = np.zeros((self._n_deltas, len(union)), work_dtype(self.dtype))
        for number, where, values in parts:
            work[number, np.searchsorted(union, where)] = values
        with np.errstate(invalid="ignore", over="ignore"):
            merged = self._recipe.merge(work)
            before = bits[start:end][union]
            after = to_bits(self.dtype, to_numbers(self.dtype, before) + merged)
        bits[start:end][union] = np.where(merged == 0, before, after)

    def _read(self, number: int) -> Bits:
        return read_chunk(self._base, self.dtype, self.n_elements, self.n_elements, number)

    def _differences(
        self, stage: Stage, number: int, bits: Bits
    ) -> Iterator[tuple[Positions, Numbers]]:
        """Yield positions and differences of one delta in a chunk, if it has any there."""
        if not stage.chunk(number):
            return
        positions, codes = stage.decode(
            number, self._pace, lambda start, n: bits[start : start + n]
        )
        before = bits[positions]
        after = VALUE_ENCODINGS[stage.change.values].decode(self.dtype, before, codes)
        with np.errstate(invalid="ignore", over="ignore"):
            yield positions, to_numbers(self.dtype, after) - to_numbers(self.dtype, before)

    def _thin(self, number: int, stage: Stage) -> _Thinned:
        """Return how one delta's differences are thinned out, having looked at all of them."""
        density = self._recipe.densities[number]
        thinned = _Thinned(number, stage)
        if density == 1:
            return thinned
        if not self._recipe.drops_at_random:
            n_kept = max(1, int(density * self.n_elements))
            if n_kept < stage.change.nnz:
                magnitudes = np.concatenate([np.abs(v) for _, v in self._all(stage)])
                thinned.least, thinned.n_least = kept_largest(magnitudes, n_kept)
            return thinned
        norm = kept_norm = 0.0
        for chunk, values in self._all(stage):
            magnitudes = np.abs(values)
            norm += float(magnitudes.sum(dtype=np.float64))
            magnitudes[self._dropped(thinned, chunk, len(values))] = 0
            kept_norm += float(magnitudes.sum(dtype=np.float64))
        if norm >= _SMALLEST_NORM and kept_norm >= _SMALLEST_NORM:
            thinned.factor = norm / kept_norm
        return thinned

    def _all(self, stage: Stage) -> Iterator[tuple[int, Numbers]]:
        for chunk in stage.change.chunks:
            for _, values in self._differences(stage, chunk.number, self._read(chunk.number)):
                yield chunk.number, values

    def _thinned_out(self, thinned: _Thinned, number: int, values: Numbers) -> Numbers:
        """Return the differences of a chunk with those that are dropped set to 0, the rest scaled."""
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

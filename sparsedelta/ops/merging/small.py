"""Merge many small tensors at a time. The result is the same as tensor by tensor, bit for bit.

A group is merged if every delta keeps all of its changes, if its tensors lie in the same order in all deltas, and if
the touched elements of each tensor are those whose bits differ. Everything else is left to ``MergedTensor``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from sparsedelta.codecs.values import Bits
from sparsedelta.dtypes import DType
from sparsedelta.files.checkpoint import Tensor
from sparsedelta.format.columns import Column, RowColumns, columns_of, starts
from sparsedelta.format.delta import Delta
from sparsedelta.format.records import DIGEST_BYTES, Row
from sparsedelta.ops.base_check import PlacedTensors
from sparsedelta.ops.merging.floats import to_bits, to_numbers, work_dtype
from sparsedelta.ops.merging.recipe import Recipe
from sparsedelta.tensors.rebuild import BaseDiffers
from sparsedelta.tensors.small import Checks, Mask, Places, SmallRows, handled
from sparsedelta.tensors.small_pairs import PairComparison, read_tensors

# numpy adds up to this many numbers one after the other, whatever the number of elements. With more, the rounding of
# a sum could depend on how many tensors are merged at a time.
_MOST_DELTAS = 7


class SmallMerge:
    """Merges groups of small tensors.

    Args:
        deltas: each delta with its columns, where the base tensors of its rows are, and the number of the row of
            each base tensor.
        tensors: all tensors of the base, in order.
        recipe: how the changes are merged.
        comparison: makes the rows of the merged tensors.
    """

    def __init__(
        self,
        deltas: Sequence[tuple[Delta, RowColumns, Places, Column]],
        tensors: Sequence[Tensor],
        recipe: Recipe,
        comparison: PairComparison,
    ) -> None:
        self._tensors = tensors
        self._recipe = recipe
        self._comparison = comparison
        self._sides = [_Side(*one) for one in deltas]

    def run(self, start: int, end: int) -> list[Row | None]:
        """Return the rows of a group of base tensors, all of one dtype; None for those that are left.

        Raises:
            BaseDiffers: a base tensor has another digest than a delta expects.
        """
        tensors = self._tensors[start:end]
        sides = [side.target(start, end) for side in self._sides]
        found = [side for side in sides if side is not None]
        dtype = tensors[0].spec.dtype
        if len(found) < len(sides) or work_dtype(dtype) is None:
            return [None] * len(tensors)
        data, at = read_tensors(tensors)
        sizes = np.array([tensor.spec.n_bytes for tensor in tensors], np.int64)
        ends = np.cumsum(sizes)
        base = data
        if len(data) != ends[-1]:  # there are other tensors between these
            base = np.concatenate([data[a : a + n] for a, n in zip(at, sizes, strict=True)])
        bits = base.view(dtype.view)
        firsts = (ends - sizes) // dtype.width
        merged, right = self._merged(dtype, bits, firsts, found)
        rows = self._comparison.run_on(
            tensors, base, ends - sizes, tensors, merged.view(np.uint8), ends - sizes
        )
        for side in self._sides:
            side.check_base(rows, start)
        return [row if one else None for row, one in zip(rows, right, strict=True)]

    def _merged(
        self,
        dtype: DType,
        bits: Bits,
        firsts: Column,
        targets: Sequence[tuple[npt.NDArray[np.uint8], Column, Mask]],
    ) -> tuple[Bits, Mask]:
        """Return the merged bits of a group, and which tensors are merged.

        Args:
            dtype: the dtype.
            bits: the bits of the base tensors, end to end.
            firsts: the first element of each tensor, (n,).
            targets: for each delta the bytes of its target tensors; how many elements of each tensor it
                touches; which tensors were rebuilt.
        """
        right = np.ones(len(firsts), np.bool_)
        differ = []
        for data, nnz, good in targets:
            differs = data.view(dtype.view) != bits
            right &= good & (np.add.reduceat(differs, firsts, dtype=np.int64) == nnz)
            differ.append(differs)
        (union,) = np.logical_or.reduce(differ).nonzero()
        merged = bits.copy()
        before = bits[union]
        work = np.zeros((len(targets), len(union)), work_dtype(dtype))
        with np.errstate(invalid="ignore", over="ignore"):
            old = to_numbers(dtype, before)
            for values, (data, _, _), differs in zip(work, targets, differ, strict=True):
                own = differs[union]
                new = to_numbers(dtype, data.view(dtype.view)[union])
                np.subtract(new, old, out=values, where=own)
            changed = self._recipe.merge(work)
            after = to_bits(dtype, old + changed)
        merged[union] = np.where(changed == 0, before, after)
        return merged, right


class _Side:
    """One delta: the rows of base tensors."""

    def __init__(self, delta: Delta, rows: RowColumns, places: Places, numbers: Column) -> None:
        nothing = np.full(len(rows.names), -1, np.int64)
        self._rows = rows
        self._records = delta.tensors
        self._nnz = np.diff(starts(rows.chunks.nnz)[rows.first_chunk])
        self._handled = handled(rows)
        self._small = SmallRows(rows, delta.payload, places, Checks(nothing, nothing, True))
        self._row = numbers

    def target(self, start: int, end: int) -> tuple[npt.NDArray[np.uint8], Column, Mask] | None:
        """Return the target tensors of base tensors ``start`` to ``end``; see ``SmallMerge._merged``.

        None if the delta has them in another order, or if the kernels cannot rebuild them.
        """
        rows = self._row[start:end]
        first, last = int(rows[0]), int(rows[-1]) + 1
        if first < 0 or bool((np.diff(rows) != 1).any()) or not self._handled[first:last].all():
            return None
        data, left = self._small.run((first, last))
        good = np.ones(end - start, np.bool_)
        good[np.array(left, np.int64) - first] = False
        return data, self._nnz[first:last], good

    def check_base(self, rows: Sequence[Row | None], start: int) -> None:
        """Raise BaseDiffers if a base tensor has another digest than this delta expects."""
        for number, row in enumerate(rows, start):
            own = int(self._row[number])
            at = int(self._rows.base_at[own])
            found = row.base.spec.digest if row and row.base else None
            if found is not None and found != self._rows.digests[at : at + DIGEST_BYTES]:
                raise BaseDiffers(self._records[own], found)


def small_merge(
    deltas: Sequence[Delta],
    found: Sequence[object],
    numbers: Sequence[Column],
    tensors: Sequence[Tensor],
    recipe: Recipe,
    comparison: PairComparison,
) -> SmallMerge | None:
    """Return a ``SmallMerge``; None if these deltas or this recipe need ``MergedTensor`` for every tensor.

    Args:
        deltas: the deltas.
        found: what ``find_base`` returned for each delta.
        numbers: for each delta, the number of the row of each base tensor; -1 if there is none, (n,).
        tensors: all tensors of the base, in order.
        recipe: how the changes are merged.
        comparison: makes the rows of the merged tensors.
    """
    sides = []
    for delta, placed, own in zip(deltas, found, numbers, strict=True):
        rows = columns_of(delta.tensors)
        if rows is None or not isinstance(placed, PlacedTensors):
            return None
        sides.append((delta, rows, placed.places, own))
    if len(sides) > _MOST_DELTAS or any(density != 1 for density in recipe.densities):
        return None
    return SmallMerge(sides, tensors, recipe, comparison)

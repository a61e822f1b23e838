"""The rows and chunks of a manifest as columns: one array for each attribute (FORMAT §4, §5, §9).

A model may have a hundred thousand small tensors. Checks and sums then run over whole arrays. ``Rows`` is the
sequence of the rows; a ``Row`` is made only when it is accessed.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, overload

import numpy as np
import numpy.typing as npt

from sparsedelta.codecs.chunk import (
    CODED_DIGEST_BYTES,
    TOUCHED_BYTES,
    Chunk,
    Coding,
)
from sparsedelta.format.records import DIGEST_BYTES, BaseTensor, Row, TensorSpec

T = TypeVar("T")
Column = npt.NDArray[np.int64]  # one number for each row, or for each chunk


@dataclass(frozen=True, slots=True)
class ChunkColumns:
    """The chunks of all rows, in order.

    Attributes:
        codings: the codings that ``coding`` counts.
        start, span, nnz: as in ``Chunk``, (n,).
        coding: number of the coding, (n,).
        width: bytes of an element, (n,).
        raw, stored: the stated raw sizes and the stored sizes of all streams.
        first_raw, first_stored: where the sizes of each chunk begin, and the end of the last, (n + 1,).
        offset: where the streams begin in the payload, and the end of the last, (n + 1,).
        coded_at: where the digest of the stored streams is in the digests, (n,).
        touched_at: where the two touched digests are; -1 if they are not known, (n,).
    """

    codings: Sequence[Coding]
    start: Column
    span: Column
    nnz: Column
    coding: Column
    width: Column
    raw: Column
    stored: Column
    first_raw: Column
    first_stored: Column
    offset: Column
    coded_at: Column
    touched_at: Column

    def coded_bytes_of(self, first_chunk: Column) -> Column:
        """Return the size of each row's chunks in the payload, (n,); ``first_chunk`` as in ``RowColumns``."""
        return np.diff(self.offset[first_chunk])


@dataclass(frozen=True, slots=True)
class RowColumns:
    """The rows of a manifest, in order. Layouts are numbered; a digest is given by where it is in ``digests``.

    Attributes:
        paths: the paths of the target's weight files.
        file: number of the weight file, (n,).
        names: the name of each tensor.
        layouts: the layouts, without digests.
        layout: number of the target's layout, (n,).
        n_bytes, n_elements: size of the target tensor, (n,).
        base_paths: the paths of the base's weight files.
        base_file: number of the base tensor's file; -1 if there is none, (n,).
        base_names: the names of base tensors that differ from the name of the row, by row.
        base_layout: number of the base tensor's layout, (n,).
        keep: how many elements are taken from the base, (n,).
        is_copied: whether the tensor has exactly the bytes of its base tensor, (n,).
        base_at, target_at: where the digests of the tensors are; -1 if they are not known, (n,).
        first_chunk: where the chunks of each row begin, and the end of the last, (n + 1,).
        chunks: the chunks.
        digests: the digests of the manifest.
    """

    paths: Sequence[str]
    file: Column
    names: Sequence[str]
    layouts: Sequence[TensorSpec]
    layout: Column
    n_bytes: Column
    n_elements: Column
    base_paths: Sequence[str]
    base_file: Column
    base_names: Mapping[int, str]
    base_layout: Column
    keep: Column
    is_copied: npt.NDArray[np.bool_]
    base_at: Column
    target_at: Column
    first_chunk: Column
    chunks: ChunkColumns
    digests: bytes

    def records(self, start: int, end: int) -> list[Row]:
        """Return the rows from ``start`` to ``end`` as records."""
        chunks = self.chunk_records(int(self.first_chunk[start]), int(self.first_chunk[end]))
        columns = (
            self.file, self.layout, self.base_file, self.base_layout, self.keep, self.base_at,
            self.target_at,
        )  # fmt: skip
        values: Any = zip(*(one[start:end].tolist() for one in columns), strict=True)
        n_chunks = np.diff(self.first_chunk[start : end + 1]).tolist()
        return [
            self._record(number, tuple(itertools.islice(chunks, n)) if n else (), *own)
            for number, (own, n) in enumerate(zip(values, n_chunks, strict=True), start)
        ]

    def _record(
        self,
        number: int,
        chunks: tuple[Chunk, ...],
        file: int,
        layout: int,
        base_file: int,
        base_layout: int,
        keep: int,
        base_at: int,
        target_at: int,
    ) -> Row:
        name, target, base = self.names[number], self.layouts[layout], None
        if base_file >= 0:
            spec = self.layouts[base_layout].with_digest(self._digest(base_at))
            base = BaseTensor(self.base_paths[base_file], self.base_names.get(number, name), spec)
            if target_at == base_at and layout == base_layout:
                return Row(self.paths[file], name, spec, base, keep, chunks)
        if target_at >= 0:
            target = target.with_digest(self._digest(target_at))
        return Row(self.paths[file], name, target, base, keep, chunks)

    def _digest(self, at: int) -> bytes:
        return self.digests[at : at + DIGEST_BYTES]

    def chunk_records(self, start: int, end: int) -> Iterator[Chunk]:
        """Yield the chunks from ``start`` to ``end`` as records."""
        chunks, digests = self.chunks, self.digests
        raws = chunks.raw[chunks.first_raw[start] : chunks.first_raw[end]].tolist()
        sizes = chunks.stored[chunks.first_stored[start] : chunks.first_stored[end]].tolist()
        raw, stored = iter(raws), iter(sizes)
        columns: Any = (
            chunks.start, chunks.span, chunks.nnz, chunks.coding, chunks.coded_at, chunks.touched_at,
            chunks.offset,
        )  # fmt: skip
        numbers = (np.diff(c[start : end + 1]) for c in (chunks.first_raw, chunks.first_stored))
        for first, span, nnz, coding, coded_at, at, offset, n_raw, n_stored in zip(
            *(column[start:end].tolist() for column in columns),
            *(column.tolist() for column in numbers),
            strict=True,
        ):
            middle, last = at + TOUCHED_BYTES, at + 2 * TOUCHED_BYTES
            yield Chunk(
                first,
                span,
                nnz,
                chunks.codings[coding],
                tuple(itertools.islice(raw, n_raw)),
                tuple(itertools.islice(stored, n_stored)),
                digests[coded_at : coded_at + CODED_DIGEST_BYTES],
                None if at < 0 else (digests[at:middle], digests[middle:last]),
                offset,
            )


class LazySequence(Sequence[T], ABC):
    """Records that are made from columns when they are accessed. Iteration makes all of them, once.

    Args:
        n: number of records.
    """

    def __init__(self, n: int) -> None:
        self._n = n
        self._records: tuple[T, ...] | None = None  # after the first iteration

    @abstractmethod
    def records(self, start: int, end: int) -> list[T]:
        """Return the records from ``start`` to ``end``."""

    def __len__(self) -> int:
        return self._n

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[T, ...]: ...
    def __getitem__(self, index: int | slice) -> T | tuple[T, ...]:
        if self._records is not None or isinstance(index, slice):
            return self._all()[index]
        number = range(self._n)[index]
        return self.records(number, number + 1)[0]

    def __iter__(self) -> Iterator[T]:
        return iter(self._all())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and self._all() == tuple(other)

    def __hash__(self) -> int:
        return hash(self._all())

    def _all(self) -> tuple[T, ...]:
        if self._records is None:
            self._records = tuple(self.records(0, self._n))
        return self._records


class Rows(LazySequence[Row]):
    """The rows of a manifest that was read.

    Attributes:
        columns: their content.
    """

    def __init__(self, columns: RowColumns) -> None:
        super().__init__(len(columns.names))
        self.columns = columns

    def records(self, start: int, end: int) -> list[Row]:
        """Return the rows from ``start`` to ``end``."""
        return self.columns.records(start, end)


def columns_of(rows: Sequence[Row]) -> RowColumns | None:
    """Return the columns of rows that were read from a manifest; None for other rows."""
    return rows.columns if isinstance(rows, Rows) else None


def starts(sizes: Column) -> Column:
    """Return the sum of the sizes before each, and their total: one item more."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes, dtype=np.int64)])


def total(column: npt.NDArray[Any]) -> int:
    """Return the sum of a column. It does not overflow: a manifest's tensors have fewer than 2^63 bits."""
    return int(column.sum())


def base_paths(rows: Sequence[Row]) -> set[str]:
    """Return the paths of the base's weight files that rows refer to."""
    columns = columns_of(rows)
    if columns:
        return {columns.base_paths[i] for i in np.unique(columns.base_file).tolist() if i >= 0}
    return {row.base.file for row in rows if row.base}

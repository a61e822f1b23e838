"""The changes of one row for any window of elements, decoded one chunk at a time (FORMAT §5–§7)."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from sparsedelta.codecs.chunk import Chunk, check_streams, coded_digest, decode_chunk
from sparsedelta.codecs.context import StartBits
from sparsedelta.codecs.indices import Positions
from sparsedelta.codecs.values import Bits, change
from sparsedelta.dtypes import DType
from sparsedelta.errors import BaseNeeded, Corrupt
from sparsedelta.format.records import Payload, Row
from sparsedelta.tensors.parallel import DENSE_ELEMENTS, WIDE_BYTES, Pace, dense_places, wide_places
from sparsedelta.tensors.start import Readable, RowStart

_NO_LIMIT = nullcontext()
Segment: TypeAlias = tuple[int, int, Chunk | None]  # first element, end, and what changes them


@dataclass(frozen=True, slots=True)
class Piece:
    """The changes of one chunk that lie within a window of elements.

    Attributes:
        values: the value encoding of the codes.
        positions: (nnz,) uint32, counted from the window's first element.
        codes: (nnz,) unsigned integers of the element's width.
        touched: the touched digests of the chunk; None if the delta lacks them, or if part of the chunk is
            outside the window.
    """

    values: str
    positions: Positions
    codes: Bits
    touched: tuple[bytes, bytes] | None = None

    def apply(self, dtype: DType, bits: Bits) -> None:
        """Apply the changes to the bits of the window, in place."""
        change(dtype, bits, 0, self.positions, self.values, self.codes)


class ChangeReader:
    """Reads the changes of a row. It is fastest if windows are requested in ascending order.

    Args:
        row: the row.
        payload: holds the chunks of the row.
        pace: receives the number of coded bytes read.
        base: the base tensor; None if there is none or it is not available.
    """

    def __init__(
        self, row: Row, payload: Payload, pace: Pace, base: Readable | None = None
    ) -> None:
        self.row = row
        self._payload = payload
        self._pace = pace
        self._base = base
        self._decoded: tuple[Chunk, Positions, Bits] | None = None

    def window(self, start: int, n: int) -> list[Piece]:
        """Return the changes of ``n`` elements from element ``start``.

        Raises:
            BaseNeeded: a chunk can be decoded only with the base tensor, which was not given.
            Corrupt: a chunk is damaged. For a chunk with classes, a wrong base has the same effect.
        """
        found = []
        chunks = self.row.chunks
        first = bisect_right(chunks, start, key=lambda chunk: chunk.end)
        for number in range(first, len(chunks)):
            chunk = chunks[number]
            if chunk.start >= start + n:
                break
            positions, codes = self._decode(chunk)
            touched = chunk.touched
            if chunk.start < start or chunk.end > start + n:
                window = max(start, chunk.start), min(start + n, chunk.end)
                # uint32, because otherwise searchsorted copies the positions
                edges = np.array([edge - chunk.start for edge in window], np.uint32)
                low, high = np.searchsorted(positions, edges).tolist()
                if low == high:
                    continue
                if high - low < chunk.nnz:
                    touched = None
                positions, codes = positions[low:high], codes[low:high]
            if chunk.start != start:
                positions = (positions + np.int64(chunk.start - start)).astype(np.uint32)
            found.append(Piece(chunk.coding.values, positions, codes, touched))
        return found

    def _decode(self, chunk: Chunk) -> tuple[Positions, Bits]:
        if self._decoded is None or self._decoded[0] is not chunk:
            self._decoded = None  # frees the memory of the previous chunk first
            self._decoded = chunk, *decode_row_chunk(self.row, chunk, self._payload, self._base)
            self._pace.advance(chunk.stored_bytes)
        return self._decoded[1:]


def decode_row_chunk(
    row: Row, chunk: Chunk, payload: Payload, base: Readable | None
) -> tuple[Positions, Bits]:
    """Return the positions and codes of one chunk; for the errors see ``ChangeReader.window``."""
    before: StartBits | None = None
    if chunk.coding.classes and (base is not None or row.keep <= chunk.start):
        before = RowStart(base, row.target.dtype, row.keep, chunk.start)
    coded = read_coded(row, chunk, payload)
    try:
        return decode_chunk(chunk, row.target.dtype, coded, before=before)
    except (BaseNeeded, Corrupt) as error:
        raise _named(row, error) from error


@contextmanager
def naming(row: Row) -> Iterator[None]:
    """Put the tensor's name before the message of an error about one of its chunks."""
    try:
        yield
    except (BaseNeeded, Corrupt) as error:
        raise _named(row, error) from error


def _named(row: Row, error: BaseNeeded | Corrupt) -> BaseNeeded | Corrupt:
    return type(error)(f"tensor {row.name!r}: {error}", tensor=row.name)


def read_coded(row: Row, chunk: Chunk, payload: Payload) -> bytes:
    """Return the stored streams of a chunk; their digest is checked.

    Raises:
        Corrupt: the digest is wrong.
    """
    coded = payload.read(chunk.offset, chunk.stored_bytes)
    found = coded_digest(coded)
    if found != chunk.digest:
        raise Corrupt(
            f"tensor {row.name!r}: a chunk of the delta is damaged; copy or download the delta again",
            tensor=row.name,
            expected=chunk.digest.hex(),
            found=found.hex(),
        )
    return coded


def segments(row: Row) -> Iterator[Segment]:
    """Yield the segments of the target tensor: (begin, end, chunk), with None between chunks."""
    at = 0
    for chunk in row.chunks:
        if at < chunk.start:
            yield at, chunk.start, None
        yield chunk.start, chunk.end, chunk
        at = chunk.end
    if at < row.target.n_elements:
        yield at, row.target.n_elements, None


def decode_row(row: Row, payload: Payload, pace: Pace) -> None:
    """Decode all chunks of a row as far as that needs no base, and check them.

    Raises:
        Corrupt: a chunk is damaged.
    """
    for chunk in row.chunks:
        with place_for(chunk.nnz, row.target.dtype):
            if chunk.coding.classes and chunk.start < row.keep:
                check_streams(chunk, row.target.dtype, read_coded(row, chunk, payload))
            else:
                decode_row_chunk(row, chunk, payload, None)
        pace.advance(chunk.stored_bytes)


def place_for(nnz: int, dtype: DType) -> AbstractContextManager[object]:
    """Return a context to hold while a chunk with ``nnz`` changes is in memory.

    It limits how many threads hold a large chunk at the same time.
    """
    if nnz <= DENSE_ELEMENTS:
        return _NO_LIMIT
    return wide_places if dtype.width == WIDE_BYTES else dense_places

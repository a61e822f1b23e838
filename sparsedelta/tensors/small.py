"""Many small tensors at a time: read, decoded, rebuilt and checked by one call of the compiled kernels.

The kernels do only what succeeds. A tensor with anything wrong, and every tensor that the kernels do not handle, is
rebuilt by ``tensors.rebuild``, which finds what is wrong and raises the error.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sparsedelta.codecs import kernels
from sparsedelta.codecs.indices import INDEX_ENCODINGS
from sparsedelta.codecs.packings import VALUE_PACKINGS
from sparsedelta.codecs.values import KINDS
from sparsedelta.files.checkpoint import read_exactly
from sparsedelta.format.columns import Column, RowColumns
from sparsedelta.format.records import Payload

# As numbered in kernels/_small.h, where the columns of the table are listed in the same order.
INDICES = {"gaps": 0, "bitmap": 1, "rice": 2}
PACKINGS = {"planes": 0, "steps": 1}
_N_COLUMNS = 16

SMALL_BYTES = 1 << 15  # of a tensor; for larger ones, the call for each tensor costs little
GROUP_BYTES = 1 << 19
ROW_BYTES = 1 << 6  # added to the size of each tensor of a group, so that a group has few of them
_BASE_BYTES = (
    1 << 21
)  # the part of the base's file that a group reads is at most this and one tensor
MOST_GAP_BYTES = 1 << 14  # between the base tensors of a group
FEWEST = 4  # tensors of a group

Mask = npt.NDArray[np.bool_]  # one flag for each row


@dataclass(frozen=True, slots=True)
class Places:
    """Where the base tensors of all rows are.

    Attributes:
        fd: descriptor of the open file; -1 if the row has no base tensor, (n,).
        at: position of the tensor's first byte in the file, (n,).
    """

    fd: Column
    at: Column


Group = tuple[int, int]  # the first row, and the row after the last


def handled(rows: RowColumns) -> Mask:
    """Return which rows the kernels can decode and rebuild, whatever the base."""
    if kernels.native is None:
        return np.zeros(len(rows.names), np.bool_)
    chunks, n_chunks = rows.chunks, np.diff(rows.first_chunk)
    whole: Mask = (rows.base_file < 0) | (
        (rows.keep == rows.n_elements) & (rows.layout == rows.base_layout)
    )
    result = whole & (n_chunks <= 1) & (rows.n_bytes > 0) & (rows.n_bytes <= SMALL_BYTES)
    has_chunk = n_chunks == 1
    result[has_chunk] &= _can_decode(rows)[rows.first_chunk[:-1][has_chunk]]
    result &= chunks.coded_bytes_of(rows.first_chunk) <= GROUP_BYTES
    return result


def _can_decode(rows: RowColumns) -> Mask:
    """Return which chunks have a coding that the kernels know, and streams that are not compressed."""
    chunks = rows.chunks
    result = np.zeros(len(chunks.start), np.bool_)
    if not len(result):
        return result
    for number, coding in enumerate(chunks.codings):
        if coding.classes or coding.index not in INDICES or coding.packing not in PACKINGS:
            continue
        own = np.flatnonzero(chunks.coding == number)
        index, packing = INDEX_ENCODINGS[coding.index], VALUE_PACKINGS[coding.packing]
        sizes = index.implied_bytes(chunks.span[own])
        is_stated = sizes is None
        first_raw, first_stored = chunks.first_raw[own], chunks.first_stored[own]
        if is_stated:
            sizes = chunks.raw[first_raw]
        plain = chunks.stored[first_stored] == sizes
        if packing.states_size:
            plain &= chunks.stored[first_stored + 1] == chunks.raw[first_raw + is_stated]
        result[own] = plain
    return result


def groups(rows: RowColumns, wanted: Mask, places: Places | None) -> list[Group]:
    """Return groups of neighbouring rows that are ``wanted``; rows in no group are to be handled one by one.

    All rows of a group are in the same file of the target, and their base tensors are near each other in one file.
    """
    if not wanted.any():
        return []
    chunks = rows.chunks
    sizes = rows.n_bytes if places else chunks.coded_bytes_of(rows.first_chunk)
    number = np.cumsum(sizes + ROW_BYTES) // GROUP_BYTES
    ends = (number[1:] != number[:-1]) | (rows.file[1:] != rows.file[:-1])
    ends |= wanted[1:] != wanted[:-1]
    if places:
        gaps = places.at[1:] - places.at[:-1] - rows.n_bytes[:-1]
        far = (gaps < 0) | (gaps > MOST_GAP_BYTES)
        far |= places.at[1:] // _BASE_BYTES != places.at[:-1] // _BASE_BYTES
        ends |= (places.fd[1:] != places.fd[:-1]) | (far & (places.fd[1:] >= 0))
    edges = [0, *(np.flatnonzero(ends) + 1).tolist(), len(wanted)]
    return [
        (start, end)
        for start, end in itertools.pairwise(edges)
        if wanted[start] and end - start >= FEWEST
    ]


def rows_outside(found: Sequence[Group], n: int) -> Iterator[int]:
    """Yield the numbers of the rows below ``n`` that are in no group."""
    at = 0
    for start, end in found:
        yield from range(at, start)
        at = end
    yield from range(at, n)


@dataclass(frozen=True, slots=True)
class Checks:
    """Which digests are compared (``tensors.rebuild``).

    Attributes:
        base: where to find the digest of each base tensor; -1: it is not compared, (n,).
        target: the same for each target tensor, (n,).
        touched: whether to compare the digests of touched elements.
    """

    base: Column
    target: Column
    touched: bool


def checks_of(rows: RowColumns, check: str, *, every_base: bool) -> Checks:
    """Return which digests to compare of the rows that are ``handled``; see ``rebuild`` for the arguments."""
    nothing = np.full(len(rows.names), -1, np.int64)
    if check == "none":
        return Checks(nothing, nothing, False)
    chunks, n_chunks = rows.chunks, np.diff(rows.first_chunk)
    is_ulp = np.array([coding.values == "ulp" for coding in chunks.codings] or [False])
    full = np.full(len(nothing), check == "full")
    proves = rows.target_at >= 0  # a right target proves that the base is right
    one = n_chunks == 1
    first = rows.first_chunk[:-1][one]
    full[one] |= chunks.touched_at[first] < 0
    proves[one] &= is_ulp[chunks.coding[first]]
    compares_base = full & (every_base | ~proves)
    return Checks(
        np.where(compares_base, rows.base_at, -1), np.where(full, rows.target_at, -1), True
    )


class SmallRows:
    """Decodes and rebuilds groups of rows.

    Args:
        rows: all rows.
        payload: holds their chunks.
        places: where the base tensors are; None: the chunks are only decoded.
        checks: which digests are compared; None if the chunks are only decoded.
    """

    def __init__(
        self,
        rows: RowColumns,
        payload: Payload,
        places: Places | None = None,
        checks: Checks | None = None,
    ) -> None:
        self._rows = rows
        self._payload = payload
        self._places = places
        self._checks = checks
        self._digests = np.frombuffer(rows.digests, np.uint8)
        codings = rows.chunks.codings
        self._codings = np.array(
            [
                (
                    KINDS[one.values],
                    INDICES.get(one.index, -1),
                    PACKINGS.get(one.packing, -1),
                )
                for one in codings
            ]
            or [(-1, -1, -1)],
            np.int64,
        )
        self._is_float = np.array([spec.dtype.is_float for spec in rows.layouts], np.bool_)
        self._width = np.array([spec.dtype.width for spec in rows.layouts], np.int64)

    def run(self, group: Group) -> tuple[npt.NDArray[np.uint8], list[int]]:
        """Return the bytes of a group's tensors, end to end, and the rows that need ``rebuild``.

        The bytes of these rows are not valid. There are no bytes if the chunks are only decoded.
        """
        start, end = group
        rows = self._rows
        n_bytes = rows.n_bytes[start:end]
        table = np.full((_N_COLUMNS, end - start), -1, np.int64)
        table[2] = n_bytes
        table[3] = self._width[rows.layout[start:end]]
        out, base = np.empty(0, np.uint8), np.empty(0, np.uint8)
        if self._places and self._checks:
            stops = np.cumsum(n_bytes)
            table[1] = stops - n_bytes
            out = np.empty(int(stops[-1]), np.uint8)
            base, table[0] = self._read_base(start, end)
            table[4] = self._checks.base[start:end]
            table[5] = self._checks.target[start:end]
        payload, stored = self._add_chunks(table, start, end)
        good = np.zeros(end - start, np.uint8)
        kernels.native.rebuild_small(  # type: ignore[union-attr]
            base, payload, self._digests, stored, np.ascontiguousarray(table.T), out, good
        )
        return out, (np.flatnonzero(good == 0) + start).tolist()

    def _read_base(self, start: int, end: int) -> tuple[npt.NDArray[np.uint8], Column]:
        """Return the part of the base's file that holds a group's base tensors, and where each of them is in it."""
        places, n_bytes = self._places, self._rows.n_bytes[start:end]
        if places is None or places.fd[start] < 0:
            return np.empty(0, np.uint8), np.full(end - start, -1, np.int64)
        at = places.at[start:end]
        low, high = int(at.min()), int((at + n_bytes).max())
        data = np.empty(high - low, np.uint8)
        read_exactly(int(places.fd[start]), data.data, low, self._rows.names[start])
        return data, at - low

    def _add_chunks(
        self, table: npt.NDArray[np.int64], start: int, end: int
    ) -> tuple[npt.NDArray[np.uint8], Column]:
        """Describe the chunks of a group in its table; return their streams, and the sizes of these."""
        rows, chunks = self._rows, self._rows.chunks
        first, last = (int(rows.first_chunk[row]) for row in (start, end))
        if first == last:
            return np.empty(0, np.uint8), np.empty(0, np.int64)
        own = slice(first, last)
        has_chunk = np.diff(rows.first_chunk[start : end + 1]) == 1
        offset = int(chunks.offset[first])
        first_size = int(chunks.first_stored[first])
        kind, index, packing = self._codings[chunks.coding[own]].T
        is_float = self._is_float[rows.layout[start:end][has_chunk]]
        table[6:, has_chunk] = (
            chunks.offset[own] - offset,
            chunks.start[own],
            chunks.span[own],
            chunks.nnz[own],
            kind + ((kind == KINDS["ulp"]) & is_float),
            index,
            packing,
            chunks.first_stored[own] - first_size,
            chunks.coded_at[own],
            chunks.touched_at[own]
            if self._checks and self._checks.touched
            else np.full_like(index, -1),
        )
        payload = self._payload.read(offset, int(chunks.offset[last]) - offset)
        sizes = chunks.stored[first_size : int(chunks.first_stored[last])]
        return np.frombuffer(payload, np.uint8), sizes

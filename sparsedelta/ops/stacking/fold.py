"""Combine the changes of several deltas to one tensor, exactly and without the base.

Differences in ulps are added modulo 2^w (w: bits per element), and new bits replace older changes. The
final bits of an element are known if it gets new bits, or if it does not come from the base and so
starts as zero bits. A chunk that overlaps no other chunk is copied. Memory is at most the changes of one
chunk of each delta.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from sparsedelta.codecs.chunk import MAX_SPAN, Chunk, Span, encode_chunk, touched_digest
from sparsedelta.codecs.indices import Positions
from sparsedelta.codecs.values import Bits, ordered, ulp_codes, ulp_differences, unordered
from sparsedelta.errors import BaseNeeded
from sparsedelta.format.records import Payload, Row, default_keep
from sparsedelta.format.spool import SpoolPayload
from sparsedelta.tensors.changes import ChangeReader, Piece, place_for, read_coded
from sparsedelta.tensors.parallel import Pace
from sparsedelta.tensors.start import Readable


@dataclass(frozen=True, slots=True)
class Link:
    """A tensor's row in one of several deltas.

    Attributes:
        number: number of the delta, from 1, for messages.
        row: the row of the tensor.
        payload: holds the chunks of the row.
    """

    number: int
    row: Row
    payload: Payload


class Fold:
    """Combines the rows of one tensor in several deltas into one row.

    Args:
        links: a chain, in order; or siblings, which must all have the same shape.
        payload: receives the chunks.
        pace: receives the number of coded bytes read.
    """

    def __init__(self, links: Sequence[Link], payload: SpoolPayload, pace: Pace) -> None:
        self._links = links
        self._payload = payload
        self._pace = pace
        self._target = links[-1].row.target
        keeps = [link.row.keep for link in links]
        self._keep = min(keeps)
        # For each link, the number of leading elements that all later links keep.
        self._limits = [min([self._target.n_elements, *keeps[i + 1 :]]) for i in range(len(links))]
        self._readers = [ChangeReader(link.row, link.payload, pace) for link in links]

    @property
    def copies(self) -> bool:
        """Whether all chunks can be copied: at most one link has chunks, and later links keep them all."""
        changing = [n for n, link in enumerate(self._links) if link.row.chunks]
        return not changing or (
            len(changing) == 1
            and self._links[changing[0]].row.chunks[-1].end <= self._limits[changing[0]]
        )

    def run(self) -> Row:
        """Return the row; its chunks are added to the payload.

        Raises:
            BaseNeeded: a chunk, or the final bits of some elements, can be computed only with the base.
        """
        first, last = self._links[0].row, self._links[-1].row
        base, keep = first.base, self._keep
        if base and not keep and not base.spec.same_layout(last.target):
            base = None
        row = replace(last, base=base, keep=keep, chunks=())
        known = last.target.digest is not None
        returned = known and base is not None and base.spec.digest == last.target.digest
        if returned and base and default_keep(base.spec, last.target) == base.spec.n_elements:
            return replace(row, keep=base.spec.n_elements)
        return replace(row, chunks=tuple(self._chunks()))

    def _chunks(self) -> Iterator[Chunk]:
        for group in overlapping(self._links):
            if len(group) == 1:
                number, chunk = group[0]
                if chunk.end <= self._limits[number]:
                    link = self._links[number]
                    coded = read_coded(link.row, chunk, link.payload)
                    self._pace.advance(len(coded))
                    yield self._payload.add_chunk(chunk, [coded])
                    continue
            for start, n in self._windows([chunk for _, chunk in group]):
                folded = self._fold(start, n)
                if folded:
                    yield folded

    def _windows(self, group: Sequence[Chunk]) -> Iterator[tuple[int, int]]:
        """Yield start and length of the windows of a group of chunks that overlap.

        Each window becomes one chunk. If the group mixes value encodings, no window has both elements
        that come from the base and elements that do not.
        """
        start, end = group[0].start, min(self._target.n_elements, max(c.end for c in group))
        mixed = len({chunk.coding.values for chunk in group}) > 1
        border = min(max(start, self._keep), end) if mixed else start
        for low, high in ((start, border), (border, end)):
            for at in range(low, high, MAX_SPAN):
                yield at, min(MAX_SPAN, high - at)

    def _fold(self, start: int, n: int) -> Chunk | None:
        found = [
            piece
            for reader, limit in zip(self._readers, self._limits, strict=True)
            if limit > start
            for piece in reader.window(start, min(n, limit - start))
        ]
        with place_for(sum(len(piece.positions) for piece in found), self._target.dtype):
            if all(piece.values == "ulp" for piece in found):
                positions, codes = self._add(found, n)
                values = "ulp"
            else:
                positions, codes = self._replace(found, start, n)
                values = "target"
            if not len(positions):
                return None
            touched = self._touched(codes, values) if start >= self._keep else None
            chunk, streams = encode_chunk(
                Span(start, n), positions, codes, values=values, touched=touched
            )
            return self._payload.add_chunk(chunk, streams)

    def _add(self, found: Sequence[Piece], n: int) -> tuple[Positions, Bits]:
        total = np.zeros(n, self._target.dtype.view)
        for piece in found:
            total[piece.positions] += ulp_differences(piece.codes)
        where = np.flatnonzero(total)
        return where.astype(np.uint32), ulp_codes(total[where])

    def _replace(self, found: Sequence[Piece], start: int, n: int) -> tuple[Positions, Bits]:
        dtype = self._target.dtype
        n_kept = min(n, max(0, self._keep - start))
        zero = ordered(dtype, np.zeros(1, dtype.view))
        # M(bits) (FORMAT §7.2) where the bits are known, else the difference so far
        ranks = np.zeros(n, dtype.view)
        ranks[n_kept:] = zero
        known = np.zeros(n, np.bool_)
        known[n_kept:] = True
        for piece in found:
            if piece.values == "ulp":
                ranks[piece.positions] += ulp_differences(piece.codes)
            else:
                ranks[piece.positions] = ordered(dtype, piece.codes)
                known[piece.positions] = True
        n_unknown = int(np.count_nonzero(ranks[~known]))
        if n_unknown:
            name = self._links[-1].row.name
            raise BaseNeeded(
                f"tensor {name!r} is changed by differences in one delta and by new values in another, so"
                f" {n_unknown} of its elements need the base; give the base (base=, --base)",
                tensor=name,
            )
        known[n_kept:] &= ranks[n_kept:] != zero
        where = np.flatnonzero(known)
        return where.astype(np.uint32), unordered(dtype, ranks[where])

    def _touched(self, codes: Bits, values: str) -> tuple[bytes, bytes]:
        """Return the touched digests of elements that were zero bits before."""
        before = np.zeros(len(codes), codes.dtype)
        after = codes
        if values == "ulp":
            dtype = self._target.dtype
            after = unordered(dtype, ordered(dtype, before) + ulp_differences(codes))
        return touched_digest(before), touched_digest(np.ascontiguousarray(after))


def overlapping(links: Sequence[Link]) -> Iterator[list[tuple[int, Chunk]]]:
    """Yield groups of overlapping chunks in ascending order: (index of the link, chunk)."""
    chunks = [(number, chunk) for number, link in enumerate(links) for chunk in link.row.chunks]
    group: list[tuple[int, Chunk]] = []
    end = 0
    for number, chunk in sorted(chunks, key=lambda item: (item[1].start, item[0])):
        if group and chunk.start >= end:
            yield group
            group, end = [], 0
        group.append((number, chunk))
        end = max(end, chunk.end)
    if group:
        yield group


def count_overlap(links: Sequence[Link], pace: Pace, base: Readable | None = None) -> int:
    """Return how many positions of one tensor are touched by more than one sibling.

    Args:
        links: the rows of the siblings.
        pace: receives the number of coded bytes read.
        base: the base tensor; None if it is not available.
    """
    readers = [ChangeReader(link.row, link.payload, pace, base) for link in links]
    total = 0
    for group in overlapping(links):
        if len({number for number, _ in group}) == 1:
            continue
        end = max(chunk.end for _, chunk in group)
        for start in range(group[0][1].start, end, MAX_SPAN):
            n = min(MAX_SPAN, end - start)
            once, twice = np.zeros(n, np.bool_), np.zeros(n, np.bool_)
            for reader in readers:
                for piece in reader.window(start, n):
                    twice[piece.positions] |= once[piece.positions]
                    once[piece.positions] = True
            total += int(np.count_nonzero(twice))
    return total

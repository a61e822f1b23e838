"""One chunk of a delta: encode touched positions and their codes to stored streams, and decode them (FORMAT §5).

The encoder keeps the index encoding and the value packing whose streams are smallest. For classes, the base must
be read a second time; ``Level.FAST`` does not use them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from sparsedelta.codecs.choice import smallest
from sparsedelta.codecs.context import Bits, ChunkContext, Positions, StartBits
from sparsedelta.codecs.exponent_classes import Choice, Keys, keys_at
from sparsedelta.codecs.indices import INDEX_ENCODINGS
from sparsedelta.codecs.packings import VALUE_PACKINGS
from sparsedelta.codecs.zstd import Level, decompress
from sparsedelta.dtypes import DType
from sparsedelta.errors import BaseNeeded, Corrupt

MAX_SPAN = 1 << 24
CODED_DIGEST_BYTES = 16
TOUCHED_BYTES = 8

_FEW = 8  # touched positions; for so few, the choice of a coding saves only a few bytes


@dataclass(frozen=True, slots=True)
class Coding:
    """How a chunk is coded.

    Attributes:
        values: a name of ``VALUE_ENCODINGS``.
        index: a name of ``INDEX_ENCODINGS``.
        packing: a name of ``VALUE_PACKINGS``.
        classes: uses classes, so that the base is needed to decode (FORMAT §6.2).
    """

    values: str
    index: str
    packing: str
    classes: bool


@dataclass(frozen=True, slots=True)
class Chunk:
    """What the manifest states about one chunk.

    Attributes:
        start: flat index of its first element.
        span: elements it covers, at most ``MAX_SPAN``.
        nnz: number of touched positions, at least 1.
        coding: how it is coded.
        raw: raw sizes of the streams whose raw size does not follow from the other fields.
        stored: stored sizes of all streams.
        digest: of the stored streams, end to end.
        touched: short digests of the touched elements before and after, if known.
        offset: where the streams begin in the payload.
    """

    start: int
    span: int
    nnz: int
    coding: Coding
    raw: tuple[int, ...]
    stored: tuple[int, ...]
    digest: bytes
    touched: tuple[bytes, bytes] | None
    offset: int = field(compare=False, default=-1)

    @property
    def end(self) -> int:
        """Flat index after its last element."""
        return self.start + self.span

    @property
    def stored_bytes(self) -> int:
        """Size of its streams in the payload."""
        return sum(self.stored)

    def at(self, offset: int) -> Chunk:
        """Return a copy whose streams begin at ``offset`` in the payload."""
        return Chunk(
            self.start,
            self.span,
            self.nnz,
            self.coding,
            self.raw,
            self.stored,
            self.digest,
            self.touched,
            offset,
        )


@dataclass(frozen=True, slots=True)
class Span:
    """The elements that a chunk covers, and what an encoder may use to code them.

    Attributes:
        start: flat index of the first element.
        n: number of elements.
        columns: elements in a row of the tensor; 0: not known.
        before: reads the bits of the elements before the change; None: do not use classes.
    """

    start: int
    n: int
    columns: int = 0
    before: StartBits | None = None


def touched_digest(bits: Bits) -> bytes:
    """Return the short digest of touched elements (FORMAT §9)."""
    return blake3(np.ascontiguousarray(bits).view(np.uint8).data).digest()[:TOUCHED_BYTES]


def encode_chunk(
    span: Span,
    positions: Positions,
    codes: Bits,
    *,
    values: str,
    touched: tuple[bytes, bytes] | None,
    level: Level = Level.DEFAULT,
    keys: Keys | None = None,
) -> tuple[Chunk, list[bytes]]:
    """Return the chunk's record, without an offset, and its streams, in the smallest coding that the level tries.

    Classes are used only where they save a tenth or more.

    Args:
        span: the elements it covers.
        positions: (nnz,) uint32, strictly increasing, below ``span.n``; not empty.
        codes: (nnz,) unsigned codes of the value encoding ``values``.
        values: the value encoding.
        touched: digests of the touched elements, if known.
        level: which codings to try.
        keys: keys of the elements at ``positions`` before the change, if already known.
    """
    if len(positions) <= _FEW:
        level = Level.FAST
    first = span.start % span.columns if span.columns else 0
    before = None if level is Level.FAST else span.before
    if before is None:
        keys = None
    elif keys is None:
        keys = keys_at(before, positions, span.n)
    context = ChunkContext(before, span.columns, first, keys)
    index, packing = smallest(positions, codes, span.n, context, level)
    streams = [*index.streams, *packing.streams]
    chunk = Chunk(
        span.start,
        span.n,
        len(positions),
        _coding(values, index.way.name, packing.way.name, index.way.classes or packing.way.classes),
        index.raw + packing.raw,
        tuple(map(len, streams)),
        coded_digest(b"".join(streams)),
        touched,
    )
    return chunk, streams


@lru_cache(maxsize=1 << 8)
def _coding(values: str, index: str, packing: str, classes: bool) -> Coding:
    """Return a coding; chunks share it."""
    return Coding(values, index, packing, classes)


@dataclass(frozen=True, slots=True)
class OpenChunk:
    """A chunk, decoded as far as this is possible without the elements before the change.

    Attributes:
        positions: the positions ``(nnz,)`` uint32, checked; or how to find them among the elements.
        needs_keys: the codes are sorted by the keys of the elements before the change.
    """

    positions: Positions | Choice
    needs_keys: bool
    _streams: Sequence[bytes]
    _chunk: Chunk
    _width: int

    def codes(self, keys: Keys | None) -> Bits:
        """Return the codes ``(nnz,)``.

        Args:
            keys: keys of the elements at the positions before the change; None if not ``needs_keys``.

        Raises:
            Corrupt: see ``decode_chunk``.
        """
        packing = VALUE_PACKINGS[self._chunk.coding.packing]
        return packing.decode(self._streams, self._chunk.nnz, self._width, keys)


def open_chunk(chunk: Chunk, dtype: DType, coded: bytes) -> OpenChunk:
    """Open a chunk; see ``decode_chunk`` for the arguments and errors."""
    coding = chunk.coding
    first, *rest = _streams(chunk, dtype, coded)
    index = INDEX_ENCODINGS[coding.index]
    positions = index.open(first, chunk.nnz, chunk.span, classes=coding.classes)
    needs_keys = coding.classes and VALUE_PACKINGS[coding.packing].has_classes
    return OpenChunk(positions, needs_keys, rest, chunk, dtype.width)


def decode_chunk(
    chunk: Chunk, dtype: DType, coded: bytes, *, before: StartBits | None = None
) -> tuple[Positions, Bits]:
    """Return the positions ``(nnz,)`` uint32 within a chunk, and the codes ``(nnz,)``. Positions are checked.

    Args:
        chunk: its record, already checked by ``check_chunk``.
        dtype: the target tensor's dtype.
        coded: its stored streams, end to end; their digest is already checked.
        before: reads the bits of the chunk's elements before the change; None: not available.

    Raises:
        BaseNeeded: the chunk has classes, and ``before`` is None.
        Corrupt: a stream is damaged or does not hold what the record states. If the chunk has classes, the
            cause may also be a wrong base.
    """
    if chunk.coding.classes:
        before = _given(before)
    opened = open_chunk(chunk, dtype, coded)
    positions, keys = opened.positions, None
    if isinstance(positions, Choice):
        positions, keys = positions.find(_given(before))
    if opened.needs_keys and keys is None:
        keys = keys_at(_given(before), positions, chunk.span)
    return positions, opened.codes(keys)


def base_needed() -> BaseNeeded:
    """Return the error of a chunk with classes that is read without the base."""
    return BaseNeeded(
        "its changes are sorted by the base's exponents and cannot be read without the base;"
        " give the base (base=, --base), or make the delta standalone (standalone=True, --standalone)"
    )


def _given(before: StartBits | None) -> StartBits:
    if before is None:
        raise base_needed()
    return before


def check_streams(chunk: Chunk, dtype: DType, coded: bytes) -> None:
    """Check the streams of a chunk as far as possible without the base: every zstd frame is valid.

    Raises:
        Corrupt: a frame is not valid.
    """
    for _ in _streams(chunk, dtype, coded):
        pass


def coded_digest(coded: bytes) -> bytes:
    """Return the digest of a chunk's stored streams (FORMAT §9)."""
    return blake3(coded).digest()[:CODED_DIGEST_BYTES]


def raw_sizes(chunk: Chunk, width: int) -> list[int]:
    """Return the raw sizes of all streams of a chunk."""
    coding, stated = chunk.coding, iter(chunk.raw)
    index, packing = INDEX_ENCODINGS[coding.index], VALUE_PACKINGS[coding.packing]
    implied = index.implied_bytes(chunk.span)
    first = next(stated) if implied is None else implied
    return [first, *packing.stream_sizes(next(stated, 0), chunk.nnz, width)]


def n_streams(coding: Coding, width: int) -> tuple[int, int]:
    """Return the number of streams of a chunk, and the number of those whose raw size the manifest states."""
    index, packing = INDEX_ENCODINGS[coding.index], VALUE_PACKINGS[coding.packing]
    n_stated = (index.implied_bytes(0) is None) + packing.states_size
    return 1 + len(packing.stream_sizes(0, 0, width)), n_stated


def _streams(chunk: Chunk, dtype: DType, coded: bytes) -> Iterator[bytes]:
    if len(coded) != chunk.stored_bytes:
        raise Corrupt(f"chunk has {len(coded)} bytes of streams, expected {chunk.stored_bytes}")
    view, start = memoryview(coded), 0
    for stored, n_bytes in zip(chunk.stored, raw_sizes(chunk, dtype.width), strict=True):
        stream = view[start : start + stored]
        start += stored
        yield bytes(stream) if stored in (0, n_bytes) else decompress(stream, n_bytes)


def check_chunk(chunk: Chunk, dtype: DType, n_elements: int) -> None:
    """Check the record of a chunk before its streams are opened (FORMAT §12, R8 and R17).

    Args:
        chunk: the record; the number of its raw and stored sizes is already checked.
        dtype: the target tensor's dtype.
        n_elements: number of elements of the target tensor.

    Raises:
        Corrupt: such a tensor cannot have this chunk.
    """
    span, nnz, coding = chunk.span, chunk.nnz, chunk.coding
    if not 1 <= span <= MAX_SPAN or chunk.end > n_elements:
        raise Corrupt(f"{_where(chunk)} covers {span} elements of a tensor of {n_elements}")
    if not 1 <= nnz <= span:
        raise Corrupt(f"{_where(chunk)} touches {nnz} of {span} elements")
    index, packing = INDEX_ENCODINGS[coding.index], VALUE_PACKINGS[coding.packing]
    if coding.classes and not (index.has_classes or packing.has_classes):
        raise Corrupt(
            f"{_where(chunk)} has classes, which neither {coding.index} nor {coding.packing} supports"
        )
    sizes = raw_sizes(chunk, dtype.width)
    if not index.possible(sizes[0], nnz, span):
        raise Corrupt(
            f"{_where(chunk)}: {sizes[0]} bytes of {coding.index} cannot hold {nnz} of {span}"
        )
    if packing.states_size and not packing.possible(sizes[-1], nnz, dtype.width):
        raise Corrupt(
            f"{_where(chunk)}: {sizes[-1]} bytes of {coding.packing} cannot hold {nnz} codes"
        )
    for number, (stored, n_bytes) in enumerate(zip(chunk.stored, sizes, strict=True)):
        zeros_allowed = number and coding.packing == "planes"
        if stored > n_bytes or (not stored and n_bytes and not zeros_allowed):
            raise Corrupt(
                f"{_where(chunk)}: a stream of {n_bytes} bytes cannot be stored in {stored}"
            )


def are_possible(
    coding: Coding,
    width: int,
    nnz: npt.NDArray[np.int64],
    span: npt.NDArray[np.int64],
    first_raw: npt.NDArray[np.int64],
    first_stored: npt.NDArray[np.int64],
    raw: npt.NDArray[np.int64],
    stored: npt.NDArray[np.int64],
) -> bool:
    """Return whether the sizes of all streams of chunks with one coding are possible, as ``check_chunk`` requires.

    Args:
        coding: how all of them are coded.
        width: bytes of an element.
        nnz: number of touched positions of each chunk, (n,).
        span: elements that each chunk covers, (n,).
        first_raw: where the sizes of each chunk begin in ``raw``, (n,).
        first_stored: where they begin in ``stored``, (n,).
        raw: stated raw sizes.
        stored: stored sizes.
    """
    index, packing = INDEX_ENCODINGS[coding.index], VALUE_PACKINGS[coding.packing]
    first = index.implied_bytes(span)
    is_stated = first is None
    first = raw[first_raw] if is_stated else first
    last: Any = raw[first_raw + is_stated] if packing.states_size else 0
    sizes = [first, *packing.stream_sizes(last, nnz, width)]
    right = index.possible(first, nnz, span) & (
        not coding.classes or index.has_classes or packing.has_classes
    )
    if packing.states_size:
        right &= packing.possible(last, nnz, width)
    for number, n_bytes in enumerate(sizes):
        held = stored[first_stored + number]
        right &= held <= n_bytes
        if not (number and coding.packing == "planes"):
            right &= (held > 0) | (n_bytes == 0)
    return bool(right.all())


def _where(chunk: Chunk) -> str:
    return f"chunk at {chunk.start}"

"""One chunk of a delta: touched positions and their codes, to and from coded streams (FORMAT §5).

The encoder keeps the index encoding and the value packing whose streams are smallest. Some need the
base's bits to be read again; ``Level.FAST`` uses none of these.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

from sparsedelta.codecs.context import NO_CONTEXT, BaseBits, Bits, ChunkContext, Positions
from sparsedelta.codecs.exponent_classes import Keys, keys_at
from sparsedelta.codecs.indices import INDEX_ENCODINGS
from sparsedelta.codecs.packings import VALUE_PACKINGS
from sparsedelta.codecs.zstd import Effort, compress_stream, decompress
from sparsedelta.dtypes import DType
from sparsedelta.errors import BaseNeeded, Corrupt

CHUNK_ELEMENTS = 1 << 24


class Level(Enum):
    """How much time a smaller delta may cost."""

    FAST = "fast"
    DEFAULT = "default"
    MAX = "max"


# What needs the base to be read has to save so much: deltas that do not can be stacked and inverted alone.
_BASE_SAVES, _BASE_SAVES_BYTES = 0.1, 256

_EFFORTS = {
    Level.FAST: Effort.ENTROPY,
    Level.DEFAULT: Effort.MATCHES,
    Level.MAX: Effort.THOROUGH,
}


@dataclass(frozen=True, slots=True)
class Chunk:
    """What the manifest says of one chunk.

    Attributes:
        number: the chunk covers flat indices from ``number * CHUNK_ELEMENTS``.
        nnz: touched positions, at least 1.
        index_encoding: a name of ``INDEX_ENCODINGS``.
        index_bytes: size of the index stream before compression.
        coded_bytes: sizes of the coded streams: index stream, then value streams. 0: not stored.
        value_packing: a name of ``VALUE_PACKINGS``.
        value_bytes: size of the last value stream before compression; 0 if ``nnz`` gives it.
    """

    number: int
    nnz: int
    index_encoding: str
    index_bytes: int
    coded_bytes: tuple[int, ...]
    value_packing: str = "planes"
    value_bytes: int = 0

    @property
    def needs_base(self) -> bool:
        """Whether the base's bits are needed to decode it."""
        index, values = INDEX_ENCODINGS[self.index_encoding], VALUE_PACKINGS[self.value_packing]
        return index.needs_base or values.needs_base


def n_chunks(n_elements: int) -> int:
    """Return how many chunks a tensor of ``n_elements`` elements has."""
    return -(-n_elements // CHUNK_ELEMENTS)


def chunk_span(n_elements: int, number: int) -> int:
    """Return how many elements chunk ``number`` covers in a tensor of ``n_elements``."""
    return min(CHUNK_ELEMENTS, n_elements - number * CHUNK_ELEMENTS)


def encode_chunk(
    number: int,
    span: int,
    positions: Positions,
    codes: Bits,
    *,
    level: Level = Level.DEFAULT,
    base: BaseBits | None = None,
    keys: Keys | None = None,
    columns: int = 0,
) -> tuple[Chunk, list[bytes]]:
    """Return the chunk's record and its coded streams, the smallest that the level tries.

    What can be read without the base is preferred unless the other saves a tenth.

    Args:
        number: which chunk of its tensor.
        span: elements it covers.
        positions: (nnz,) uint32, strictly increasing, below ``span``; not empty.
        codes: (nnz,) unsigned codes of a value encoding.
        level: how much to try.
        base: the bits of the chunk's elements before the change; None: use nothing that needs them.
        keys: of the base's elements at ``positions``, if they are available.
        columns: elements in a row of the tensor; 0: not known.
    """
    first = number * CHUNK_ELEMENTS % columns if columns else 0
    if level is Level.FAST:
        base = None
    if base is None:
        keys = None
    elif keys is None:
        keys = keys_at(base, positions, span)
    index = _position_candidates(positions, span, ChunkContext(base, columns, first, keys), level)
    values = _code_candidates(codes, keys, level)
    chosen = [_smallest(parts, with_base=False) for parts in (index, values)]
    smallest = [_smallest(parts, with_base=True) for parts in (index, values)]
    n_bytes = sum(map(len, chosen))
    saved = n_bytes - sum(map(len, smallest))
    if saved >= _BASE_SAVES_BYTES and saved >= _BASE_SAVES * n_bytes:
        chosen = smallest
    index_part, value_part = chosen
    frames = [*index_part.frames, *value_part.frames]
    chunk = Chunk(
        number,
        len(positions),
        index_part.name,
        index_part.n_bytes,
        tuple(len(frame) for frame in frames),
        value_part.name,
        value_part.n_bytes,
    )
    return chunk, frames


@dataclass(frozen=True, slots=True)
class _Candidate:
    name: str
    needs_base: bool
    n_bytes: int  # before compression, as the record states it
    frames: list[bytes]

    def __len__(self) -> int:
        return sum(len(frame) for frame in self.frames)


def _smallest(candidates: Sequence[_Candidate], *, with_base: bool) -> _Candidate:
    return min((c for c in candidates if with_base or not c.needs_base), key=len)


def _position_candidates(
    positions: Positions, span: int, context: ChunkContext, level: Level
) -> list[_Candidate]:
    candidates = []
    for name, encoding in INDEX_ENCODINGS.items():
        tried = encoding.is_quick or level is not Level.FAST
        if not (tried and encoding.worth_trying(len(positions), span)):
            continue
        stream = encoding.encode(positions, span, context)
        if stream is None:
            continue
        frame = compress_stream(stream.data, _EFFORTS[level]) if len(stream) else b""
        candidates.append(_Candidate(name, encoding.needs_base, len(stream), [frame]))
        if not frame:
            break
    return candidates


def _code_candidates(codes: Bits, keys: Keys | None, level: Level) -> list[_Candidate]:
    candidates = []
    for name, packing in VALUE_PACKINGS.items():
        tried = packing.is_quick or level is not Level.FAST
        streams = packing.encode(codes, keys) if tried else None
        if streams is None:
            continue
        frames = [
            compress_stream(stream.data, _EFFORTS[level]) if len(stream) else b""
            for stream in streams
        ]
        n_bytes = len(streams[-1]) if packing.states_size else 0
        candidates.append(_Candidate(name, packing.needs_base, n_bytes, frames))
    return candidates


def decode_chunk(
    chunk: Chunk, dtype: DType, span: int, coded: bytes, *, base: BaseBits | None = None
) -> tuple[Positions, Bits]:
    """Return positions ``(nnz,)`` uint32 and codes ``(nnz,)`` of a chunk; positions are checked.

    Args:
        chunk: its record, already checked by ``check_chunk``.
        dtype: the target tensor's dtype.
        span: elements the chunk covers.
        coded: its coded streams, end to end.
        base: the bits of the chunk's elements before the change; None: they are not available.

    Raises:
        BaseNeeded: the chunk cannot be read without the base's bits.
        Corrupt: a stream is damaged or does not hold what the record says; of a chunk that needs the
            base, or the base is another.
    """
    streams = list(_streams(chunk, dtype, coded))
    if chunk.needs_base and base is None:
        raise BaseNeeded(
            f"chunk {chunk.number} is coded by the base's exponents ({chunk.index_encoding},"
            f" {chunk.value_packing}) and cannot be read without the base; give the base (--base), or"
            " make the delta with --standalone"
        )
    index = INDEX_ENCODINGS[chunk.index_encoding]
    context = NO_CONTEXT if base is None else ChunkContext(base)
    positions = index.decode(streams[0], chunk.nnz, span, context)
    if len(positions) != chunk.nnz:
        raise Corrupt(f"chunk holds {len(positions)} positions, expected {chunk.nnz}")
    packing = VALUE_PACKINGS[chunk.value_packing]
    keys = keys_at(base, positions, span) if base and packing.needs_base else None
    return positions, packing.decode(streams[1:], chunk.nnz, dtype.width, keys)


def check_streams(chunk: Chunk, dtype: DType, coded: bytes) -> None:
    """Check what can be known of a chunk's coded streams without the base: every frame is sound.

    Raises:
        Corrupt: one is not.
    """
    for _ in _streams(chunk, dtype, coded):
        pass


def _streams(chunk: Chunk, dtype: DType, coded: bytes) -> Iterator[bytes]:
    packing = VALUE_PACKINGS[chunk.value_packing]
    sizes = [
        chunk.index_bytes,
        *packing.stream_sizes(chunk.value_bytes, chunk.nnz, dtype.width),
    ]
    for frame, n_bytes in zip(_split(coded, chunk.coded_bytes), sizes, strict=True):
        yield decompress(frame, n_bytes) if frame else b""


def check_chunk(chunk: Chunk, dtype: DType, n_elements: int) -> None:
    """Check what can be known of a chunk before a frame is opened (FORMAT §12, R17).

    Args:
        chunk: the record; its index encoding is a known one.
        dtype: the target tensor's dtype.
        n_elements: the target tensor's elements.

    Raises:
        Corrupt: it cannot be a chunk of such a tensor.
    """
    if chunk.number >= n_chunks(n_elements):
        raise Corrupt(f"chunk {chunk.number} lies outside a tensor of {n_elements} elements")
    span = chunk_span(n_elements, chunk.number)
    if not 1 <= chunk.nnz <= span:
        raise Corrupt(f"chunk {chunk.number} touches {chunk.nnz} of {span} elements")
    if not INDEX_ENCODINGS[chunk.index_encoding].possible(chunk.index_bytes, chunk.nnz, span):
        raise Corrupt(
            f"chunk {chunk.number}: {chunk.index_bytes} bytes of {chunk.index_encoding}"
            f" cannot hold {chunk.nnz} positions in {span} elements"
        )
    packing = VALUE_PACKINGS[chunk.value_packing]
    sizes = [chunk.index_bytes, *packing.stream_sizes(chunk.value_bytes, chunk.nnz, dtype.width)]
    if len(chunk.coded_bytes) != len(sizes):
        raise Corrupt(
            f"chunk {chunk.number} has {len(chunk.coded_bytes)} streams, expected {len(sizes)}"
            f" for {dtype.name} in {chunk.value_packing}"
        )
    if not packing.possible(chunk.value_bytes, chunk.nnz, dtype.width):
        raise Corrupt(
            f"chunk {chunk.number}: {chunk.value_bytes} bytes of {chunk.value_packing} cannot hold"
            f" {chunk.nnz} codes"
        )
    for number, (size, n_bytes) in enumerate(zip(chunk.coded_bytes, sizes, strict=True)):
        is_plane = number and chunk.value_packing == "planes"
        if not is_plane and bool(size) != bool(n_bytes):
            raise Corrupt(
                f"chunk {chunk.number}: a stream and its coded size disagree, {n_bytes} and {size}"
            )


def _split(coded: bytes, sizes: Sequence[int]) -> list[memoryview]:
    frames, start = [], 0
    for size in sizes:
        frames.append(memoryview(coded)[start : start + size])
        start += size
    if start != len(coded):
        raise Corrupt(f"chunk has {len(coded)} bytes of streams, expected {start}")
    return frames

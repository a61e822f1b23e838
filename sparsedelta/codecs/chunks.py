"""One chunk of a delta: touched positions and their codes, to and from coded streams (FORMAT §5)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from sparsedelta.codecs.indices import INDEX_ENCODINGS, Positions
from sparsedelta.codecs.values import plane
from sparsedelta.codecs.zstd import compress_stream, decompress
from sparsedelta.dtypes import DType
from sparsedelta.errors import Corrupt

CHUNK_ELEMENTS = 1 << 24


@dataclass(frozen=True, slots=True)
class Chunk:
    """What the manifest says of one chunk.

    Attributes:
        number: the chunk covers flat indices from ``number * CHUNK_ELEMENTS``.
        nnz: touched positions, at least 1.
        index_encoding: a name of ``INDEX_ENCODINGS``.
        index_bytes: size of the index stream before compression.
        coded_bytes: sizes of the coded streams: index stream, then one plane per byte of an
            element, least significant first. 0: not stored.
    """

    number: int
    nnz: int
    index_encoding: str
    index_bytes: int
    coded_bytes: tuple[int, ...]


def n_chunks(n_elements: int) -> int:
    """Return how many chunks a tensor of ``n_elements`` elements has."""
    return -(-n_elements // CHUNK_ELEMENTS)


def chunk_span(n_elements: int, number: int) -> int:
    """Return how many elements chunk ``number`` covers in a tensor of ``n_elements``."""
    return min(CHUNK_ELEMENTS, n_elements - number * CHUNK_ELEMENTS)


def encode_chunk(
    number: int, span: int, positions: Positions, codes: npt.NDArray[Any]
) -> tuple[Chunk, list[bytes]]:
    """Return the chunk's record and its coded streams, the smallest of the known index encodings.

    Args:
        number: which chunk of its tensor.
        span: elements it covers.
        positions: (nnz,) uint32, strictly increasing, below ``span``; not empty.
        codes: (nnz,) unsigned codes of a value encoding.
    """
    nnz = len(positions)
    best: tuple[int, str, int, bytes] | None = None
    for name, encoding in INDEX_ENCODINGS.items():
        if not encoding.worth_trying(nnz, span):
            continue
        stream = encoding.encode(positions, span)
        frame = compress_stream(stream.data) if len(stream) else b""
        if best is None or len(frame) < best[0]:
            best = (len(frame), name, len(stream), frame)
        if not frame:
            break
    if best is None:
        raise ValueError(f"no index encoding for {nnz} positions in a span of {span}")
    _, name, index_bytes, index_frame = best
    frames = [index_frame]
    for j in range(codes.itemsize):
        bytes_j = plane(codes, j)
        frames.append(compress_stream(np.ascontiguousarray(bytes_j).data) if bytes_j.any() else b"")
    sizes = tuple(len(frame) for frame in frames)
    return Chunk(number, nnz, name, index_bytes, sizes), frames


def decode_chunk(
    chunk: Chunk, dtype: DType, span: int, coded: bytes
) -> tuple[Positions, npt.NDArray[Any]]:
    """Return positions ``(nnz,)`` uint32 and codes ``(nnz,)`` of a chunk; positions are checked.

    Args:
        chunk: its record, already checked by ``check_chunk``.
        dtype: the target tensor's dtype.
        span: elements the chunk covers.
        coded: its coded streams, end to end.

    Raises:
        Corrupt: a stream is damaged or does not hold what the record says.
    """
    frames = _split(coded, chunk.coded_bytes)
    stream = decompress(frames[0], chunk.index_bytes) if chunk.index_bytes else b""
    positions = INDEX_ENCODINGS[chunk.index_encoding].decode(stream, chunk.nnz, span)
    if len(positions) != chunk.nnz:
        raise Corrupt(f"chunk holds {len(positions)} positions, expected {chunk.nnz}")
    planes = np.zeros((chunk.nnz, dtype.width), np.uint8)
    for j, frame in enumerate(frames[1:]):
        if frame:
            planes[:, j] = np.frombuffer(decompress(frame, chunk.nnz), np.uint8)
    return positions, planes.view(dtype.view).reshape(chunk.nnz)


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
    if len(chunk.coded_bytes) != 1 + dtype.width:
        raise Corrupt(
            f"chunk {chunk.number} has {len(chunk.coded_bytes)} streams,"
            f" expected {1 + dtype.width} for {dtype.name}"
        )
    if bool(chunk.index_bytes) != bool(chunk.coded_bytes[0]):
        raise Corrupt(f"chunk {chunk.number}: index stream and its coded size disagree")


def _split(coded: bytes, sizes: Sequence[int]) -> list[memoryview]:
    frames, start = [], 0
    for size in sizes:
        frames.append(memoryview(coded)[start : start + size])
        start += size
    if start != len(coded):
        raise Corrupt(f"chunk has {len(coded)} bytes of streams, expected {start}")
    return frames

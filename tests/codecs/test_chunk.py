"""Chunks: the smallest index encoding, zero planes left out, records checked before frames are opened."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from helpers import assert_bit_equal

from sparsedelta.codecs.chunk import (
    CHUNK_ELEMENTS,
    Chunk,
    Level,
    check_chunk,
    check_streams,
    chunk_span,
    decode_chunk,
    encode_chunk,
    n_chunks,
)
from sparsedelta.codecs.context import BaseBits
from sparsedelta.codecs.indices import INDEX_ENCODINGS, Positions
from sparsedelta.codecs.zstd import compress_stream, decompress
from sparsedelta.dtypes import DTYPES
from sparsedelta.errors import BaseNeeded, Corrupt

BF16 = DTYPES["BF16"]


def sample(nnz: int, span: int, seed: int = 0) -> tuple[Positions, npt.NDArray[Any]]:
    draw = np.random.default_rng(seed)
    positions = np.sort(draw.choice(span, nnz, replace=False)).astype(np.uint32)
    return positions, draw.integers(1, 1 << 16, nnz).astype("<u2")


def test_spans() -> None:
    assert CHUNK_ELEMENTS == 1 << 24
    for n, spans in [
        (0, []),
        (1, [1]),
        ((1 << 24) - 1, [(1 << 24) - 1]),
        (1 << 24, [1 << 24]),
        ((1 << 24) + 1, [1 << 24, 1]),
        ((1 << 31) + 100, [1 << 24] * 128 + [100]),
    ]:
        assert [chunk_span(n, i) for i in range(n_chunks(n))] == spans


@pytest.mark.parametrize(("nnz", "span"), [(1, 1), (1, 9), (40, 4000), (999, 1000), (1000, 1000)])
def test_roundtrip(nnz: int, span: int) -> None:
    positions, codes = sample(nnz, span)
    chunk, frames = encode_chunk(3, span, positions, codes)
    assert (chunk.number, chunk.nnz) == (3, nnz)
    assert chunk.coded_bytes == tuple(map(len, frames))
    decoded = decode_chunk(chunk, BF16, span, b"".join(frames))
    assert_bit_equal(decoded[0], positions)
    assert_bit_equal(decoded[1], codes)


@pytest.mark.parametrize(
    ("nnz", "encoding"),
    [(3, "gap16"), (2_000, "rice"), (50_000, "bitmap"), (100_000, "all")],
)
def test_smallest_encoding_is_kept(nnz: int, encoding: str) -> None:
    span = 100_000
    positions, codes = sample(nnz, span)
    chunk, _ = encode_chunk(0, span, positions, codes)
    sizes = {
        name: len(compress_stream(stream.data)) if len(stream) else 0
        for name, other in INDEX_ENCODINGS.items()
        if name != "all" or nnz == span
        for stream in [other.encode(positions, span)]
        if stream is not None
    }
    assert chunk.index_encoding == encoding
    assert chunk.coded_bytes[0] == min(sizes.values()) == sizes[encoding]


def test_no_encoding_left_untried_would_have_won() -> None:
    span = 1 << 20
    for nnz in (100, 500, 530, 3000, 10_400, 10_600, 60_000, 66_000, 120_000, 900_000):
        positions, codes = sample(nnz, span, seed=nnz)
        chunk, _ = encode_chunk(0, span, positions, codes)
        for name in {"gap8", "gap16", "bitmap"} - {chunk.index_encoding}:
            stream = INDEX_ENCODINGS[name].encode(positions, span)
            assert stream is not None
            other = compress_stream(stream.data)
            assert chunk.coded_bytes[0] <= len(other), (nnz, name)


def test_planes_of_zeros_are_not_stored() -> None:
    positions = np.arange(4, dtype=np.uint32)
    chunk, frames = encode_chunk(0, 4, positions, np.array([1, 2, 3, 4], "<u2"), level=Level.FAST)
    assert chunk.coded_bytes == (0, len(frames[1]), 0)
    assert decompress(frames[1], 4) == b"\1\2\3\4"
    codes = np.array([0x100, 0x200, 0x300, 0x100], "<u2")
    chunk, frames = encode_chunk(0, 4, positions, codes, level=Level.FAST)
    assert chunk.coded_bytes == (0, 0, len(frames[2]))
    assert_bit_equal(decode_chunk(chunk, BF16, 4, b"".join(frames))[1], codes)


def test_stored_plane_of_zeros_is_read() -> None:
    frames = [b"", compress_stream(b"\5\6"), compress_stream(b"\0\0")]
    chunk = Chunk(0, 2, "all", 0, tuple(map(len, frames)))
    assert decode_chunk(chunk, BF16, 2, b"".join(frames))[1].tolist() == [5, 6]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"number": 1}, "lies outside"),
        ({"nnz": 0}, "touches 0"),
        ({"nnz": 101}, "touches 101"),
        ({"index_bytes": 3}, "cannot hold"),
        ({"index_bytes": 1}, "cannot hold"),
        ({"index_encoding": "bitmap"}, "cannot hold"),
        ({"index_encoding": "all"}, "cannot hold"),
        ({"coded_bytes": (9, 9)}, "2 streams, expected 3"),
        ({"coded_bytes": (9, 9, 9, 9)}, "4 streams, expected 3"),
        ({"coded_bytes": (0, 9, 9)}, "disagree"),
        ({"index_encoding": "all", "nnz": 100, "index_bytes": 0}, "disagree"),
        ({"index_encoding": "tiles", "index_bytes": 7}, "cannot hold"),
        ({"index_encoding": "exponent", "index_bytes": 32_794}, "cannot hold"),
        ({"value_bytes": 1}, "cannot hold"),
        ({"value_packing": "steps", "value_bytes": 9}, "3 streams, expected 2"),
        ({"value_packing": "steps", "value_bytes": 3, "coded_bytes": (9, 9)}, "cannot hold"),
        ({"value_packing": "steps", "value_bytes": 9, "coded_bytes": (9, 0)}, "disagree"),
        ({"value_packing": "scaled", "value_bytes": 5}, "cannot hold"),
        ({"value_packing": "scaled", "value_bytes": 0}, "disagree"),
        ({"value_packing": "scaled", "value_bytes": 4, "coded_bytes": (9, 0, 9)}, "disagree"),
    ],
)
def test_impossible_records_are_refused(changes: dict[str, Any], problem: str) -> None:
    chunk = Chunk(0, 2, "gap8", 2, (9, 9, 9))
    check_chunk(chunk, BF16, 100)
    with pytest.raises(Corrupt, match=problem):
        check_chunk(replace(chunk, **changes), BF16, 100)


def test_chunk_of_an_empty_tensor_is_refused() -> None:
    with pytest.raises(Corrupt, match="lies outside"):
        check_chunk(Chunk(0, 1, "all", 0, (0, 9, 9)), BF16, 0)


def test_last_chunk_is_held_to_its_own_span() -> None:
    n = (1 << 24) + 3
    check_chunk(Chunk(1, 3, "all", 0, (0, 9, 9)), BF16, n)
    with pytest.raises(Corrupt, match="touches 4 of 3"):
        check_chunk(Chunk(1, 4, "gap8", 4, (9, 9, 9)), BF16, n)


def test_damaged_streams_are_refused() -> None:
    positions, codes = sample(20, 300)
    chunk, frames = encode_chunk(0, 300, positions, codes, level=Level.FAST)
    coded = b"".join(frames)
    with pytest.raises(Corrupt, match="bytes of streams"):
        decode_chunk(chunk, BF16, 300, coded + b"\0")
    with pytest.raises(Corrupt, match="bytes of streams"):
        decode_chunk(chunk, BF16, 300, coded[:-1])
    with pytest.raises(Corrupt, match="compressed stream"):
        decode_chunk(chunk, BF16, 300, b"\0" + coded[1:])
    short = [frames[0], compress_stream(bytes(19)), frames[2]]
    damaged = replace(chunk, coded_bytes=tuple(map(len, short)))
    with pytest.raises(Corrupt, match="holds 19 bytes, expected 20"):
        decode_chunk(damaged, BF16, 300, b"".join(short))


def small_steps(span: int, share: float) -> tuple[Positions, npt.NDArray[Any], npt.NDArray[Any]]:
    """Return positions that go with the base's exponents, codes of small steps, and the base."""
    draw = np.random.default_rng(7)
    base = (draw.normal(0, 0.02, span).astype("<f4").view("<u4") >> 16).astype("<u2")
    exponents = (base >> 7 & 255).astype(float)
    likely = np.minimum(0.8, share * 2.0 ** (121 - exponents))
    positions = np.flatnonzero(draw.random(span) < likely).astype(np.uint32)
    return positions, draw.choice(np.array([1, 2], "<u2"), len(positions)), base


def test_the_base_helps_where_it_saves_a_tenth() -> None:
    positions, codes, bits = small_steps(1 << 18, 0.002)
    found, frames = encode_chunk(0, 1 << 18, positions, codes, base=reader(bits))
    alone, alone_frames = encode_chunk(0, 1 << 18, positions, codes)
    assert (found.index_encoding, found.needs_base, alone.needs_base) == ("exponent", True, False)
    assert sum(map(len, frames)) <= 0.9 * sum(map(len, alone_frames))
    with pytest.raises(BaseNeeded, match="--standalone"):
        decode_chunk(found, BF16, 1 << 18, b"".join(frames))
    check_streams(found, BF16, b"".join(frames))
    with pytest.raises(Corrupt):
        check_streams(found, BF16, b"\0" + b"".join(frames)[1:])
    uniform, codes = sample(4000, 1 << 18)
    found, _ = encode_chunk(0, 1 << 18, uniform, codes, base=reader(bits))
    assert not found.needs_base


def test_fast_never_needs_the_base_and_max_is_never_larger() -> None:
    positions, codes, bits = small_steps(1 << 18, 0.002)
    sizes = {}
    for level in Level:
        chunk, frames = encode_chunk(0, 1 << 18, positions, codes, level=level, base=reader(bits))
        sizes[level] = sum(map(len, frames))
        assert chunk.needs_base == (level is not Level.FAST)
    assert sizes[Level.MAX] <= sizes[Level.DEFAULT] < sizes[Level.FAST]


def reader(bits: npt.NDArray[Any]) -> BaseBits:
    return lambda start, n: bits[start : start + n]


def test_another_base_is_an_error_or_other_positions_never_more() -> None:
    positions, codes, bits = small_steps(1 << 16, 0.01)
    chunk, frames = encode_chunk(0, 1 << 16, positions, codes, base=reader(bits))
    assert chunk.needs_base
    noise = np.random.default_rng(8).integers(0, 1 << 16, 1 << 16).astype("<u2")
    for other in (bits[::-1].copy(), bits ^ np.uint16(0x80), noise):
        try:
            found, _ = decode_chunk(chunk, BF16, 1 << 16, b"".join(frames), base=reader(other))
        except Corrupt:
            continue
        assert len(found) == chunk.nnz
        assert (np.diff(found.astype(np.int64)) > 0).all()
        assert found[-1] < 1 << 16

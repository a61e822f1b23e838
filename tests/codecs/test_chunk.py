"""Chunks: the smallest coding is chosen, plain and empty streams, records are checked before streams are read."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from helpers import assert_bit_equal

from sparsedelta.codecs.chunk import (
    MAX_SPAN,
    Chunk,
    Coding,
    Span,
    check_chunk,
    check_streams,
    coded_digest,
    decode_chunk,
    encode_chunk,
    touched_digest,
)
from sparsedelta.codecs.context import StartBits
from sparsedelta.codecs.indices import INDEX_ENCODINGS, Positions
from sparsedelta.codecs.zstd import Level, compress_stream, decompress
from sparsedelta.dtypes import DTYPES
from sparsedelta.errors import BaseNeeded, Corrupt

BF16 = DTYPES["BF16"]
Bits = npt.NDArray[Any]


def sample(nnz: int, span: int, seed: int = 0) -> tuple[Positions, Bits]:
    draw = np.random.default_rng(seed)
    positions = np.sort(draw.choice(span, nnz, replace=False)).astype(np.uint32)
    return positions, draw.integers(1, 1 << 16, nnz).astype("<u2")


def reader(bits: Bits) -> StartBits:
    return lambda start, n: bits[start : start + n]


def encode(
    positions: Positions,
    codes: Bits,
    span: int,
    *,
    start: int = 0,
    level: Level = Level.DEFAULT,
    before: Bits | None = None,
) -> tuple[Chunk, bytes]:
    """Return a chunk and its concatenated streams."""
    place = Span(start, span, before=None if before is None else reader(before))
    chunk, streams = encode_chunk(place, positions, codes, values="ulp", touched=None, level=level)
    return chunk, b"".join(streams)


def gaps_and_planes(*stored: int, nnz: int = 2, span: int = 100, raw: int = 2) -> Chunk:
    """Return the record of a chunk of 16-bit elements."""
    coding = Coding("ulp", "gaps", "planes", classes=False)
    return Chunk(0, span, nnz, coding, (raw,), stored, bytes(16), None)


@pytest.mark.parametrize(("nnz", "span"), [(1, 1), (1, 9), (40, 4000), (999, 1000), (1000, 1000)])
@pytest.mark.parametrize("start", [0, 1, 12_345_677])
def test_roundtrip(nnz: int, span: int, start: int) -> None:
    positions, codes = sample(nnz, span)
    chunk, coded = encode(positions, codes, span, start=start)
    assert (chunk.start, chunk.span, chunk.end, chunk.nnz) == (start, span, start + span, nnz)
    assert chunk.stored_bytes == len(coded)
    assert chunk.digest == coded_digest(coded)
    check_chunk(chunk, BF16, start + span)
    decoded = decode_chunk(chunk, BF16, coded)
    assert_bit_equal(decoded[0], positions)
    assert_bit_equal(decoded[1], codes)


def test_digests_are_those_of_the_format() -> None:
    assert coded_digest(b"").hex() == "af1349b9f5f9a1a6a0404dea36dcc949"
    assert touched_digest(np.array([0x0201, 0x0403], "<u2")) == touched_digest(
        np.array([1, 2, 3, 4], "u1")
    )
    assert touched_digest(np.empty(0, "<u2")).hex() == "af1349b9f5f9a1a6"


@pytest.mark.parametrize(
    ("nnz", "encoding"), [(2_000, "rice"), (40_000, "gaps"), (50_000, "bitmap"), (99_999, "rice")]
)
def test_smallest_encoding_is_kept(nnz: int, encoding: str) -> None:
    span = 100_000
    positions, codes = sample(nnz, span)
    if encoding == "gaps":  # every second of most, which repeats itself
        positions = np.arange(0, 2 * nnz, 2, dtype=np.uint32)
    chunk, _ = encode(positions, codes, span)
    sizes = {
        name: len(compress_stream(stream.data))
        for name, other in INDEX_ENCODINGS.items()
        for stream in [other.encode(positions, span)]
        if stream is not None
    }
    assert chunk.coding.index == encoding
    assert chunk.stored[0] == min(sizes.values()) == sizes[encoding]


def test_no_encoding_left_untried_would_have_won() -> None:
    span = 1 << 18
    for nnz in (25, 125, 132, 750, 2600, 2650, 15_000, 16_500, 30_000, 225_000, span):
        positions, codes = sample(nnz, span, seed=nnz)
        chunk, _ = encode(positions, codes, span)
        for name in {"gaps", "bitmap", "rice"} - {chunk.coding.index}:
            stream = INDEX_ENCODINGS[name].encode(positions, span)
            assert stream is not None
            assert chunk.stored[0] <= len(compress_stream(stream.data)), (nnz, name)


def test_planes_of_zeros_are_not_stored() -> None:
    positions = np.arange(300, dtype=np.uint32)
    low = sample(300, 300)[1] & np.uint16(255)
    for codes, empty in ((low, 2), (low << np.uint16(8), 1)):
        chunk, coded = encode(positions, codes, 300, level=Level.FAST)
        assert chunk.coding.packing == "planes"
        assert [n for n, size in enumerate(chunk.stored) if not size] == [empty]
        assert_bit_equal(decode_chunk(chunk, BF16, coded)[1], codes)


def test_streams_are_plain_where_a_frame_is_not_smaller() -> None:
    chunk, coded = encode(*sample(3, 3), 3, level=Level.FAST)
    assert chunk.stored == (*chunk.raw, 3, 3) or chunk.stored == (1, 3, 3)
    assert len(coded) == sum(chunk.stored)
    ones = np.ones(5000, "<u2")
    chunk, coded = encode(np.arange(5000, dtype=np.uint32), ones, 5000, level=Level.FAST)
    assert 0 < chunk.stored[1] < 50
    first = chunk.stored[0]
    assert decompress(coded[first : first + chunk.stored[1]], 5000) == b"\1" * 5000


def test_plane_of_zeros_is_read_plain_framed_and_left_out() -> None:
    for high in (bytes(50), compress_stream(bytes(50)), b""):
        coded = bytes(50) + b"\5" * 50 + high
        chunk = gaps_and_planes(50, 50, len(high), nnz=50, span=50, raw=50)
        check_chunk(chunk, BF16, 50)
        assert decode_chunk(chunk, BF16, coded)[1].tolist() == [5] * 50


@pytest.mark.parametrize(
    ("changes", "coding", "problem"),
    [
        ({"start": 1}, {}, "covers 100 elements of a tensor of 100"),
        ({"span": 0}, {}, "covers 0"),
        ({"span": MAX_SPAN + 1}, {}, "covers 16777217"),
        ({"nnz": 0}, {}, "touches 0"),
        ({"nnz": 101}, {}, "touches 101"),
        ({"raw": (3,)}, {}, "cannot hold"),
        ({"raw": (1,)}, {}, "cannot hold"),
        ({"raw": (7,)}, {"index": "tiles"}, "cannot hold"),
        ({"raw": (1,)}, {"index": "rice"}, "cannot hold"),
        ({"raw": (32_794,)}, {"index": "rice"}, "cannot hold"),
        ({"stored": (0, 2, 2)}, {}, "cannot be stored in 0"),
        ({"stored": (3, 2, 2)}, {}, "2 bytes cannot be stored in 3"),
        ({"stored": (2, 3, 2)}, {}, "2 bytes cannot be stored in 3"),
        ({"stored": (14, 2, 2), "raw": ()}, {"index": "bitmap"}, "13 bytes cannot be stored in 14"),
        ({"raw": (2, 3), "stored": (2, 3)}, {"packing": "steps"}, "cannot hold"),
        ({"raw": (2, 32_775), "stored": (2, 9)}, {"packing": "steps"}, "cannot hold"),
        ({"raw": (2, 9), "stored": (2, 0)}, {"packing": "steps"}, "cannot be stored in 0"),
        ({"raw": (2, 5), "stored": (2, 2, 5)}, {"packing": "scaled"}, "cannot hold"),
        ({"raw": (2, 4), "stored": (2, 0, 4)}, {"packing": "scaled"}, "cannot be stored in 0"),
        ({"raw": (2, 4), "stored": (2, 2, 0)}, {"packing": "scaled"}, "cannot be stored in 0"),
        ({}, {"classes": True}, "has classes, which neither gaps nor planes supports"),
    ],
)
def test_impossible_records_are_refused(
    changes: dict[str, Any], coding: dict[str, Any], problem: str
) -> None:
    chunk = gaps_and_planes(2, 2, 2)
    check_chunk(chunk, BF16, 100)
    with pytest.raises(Corrupt, match=problem):
        check_chunk(replace(chunk, coding=replace(chunk.coding, **coding), **changes), BF16, 100)


def test_records_that_are_just_possible() -> None:
    chunk, classes = gaps_and_planes(2, 2, 2), Coding("ulp", "gaps", "steps", classes=True)
    check_chunk(replace(chunk, start=(1 << 40) - 100), BF16, 1 << 40)
    check_chunk(replace(chunk, span=MAX_SPAN), BF16, MAX_SPAN)
    check_chunk(replace(chunk, stored=(2, 0, 0)), BF16, 100)
    check_chunk(replace(chunk, coding=classes, raw=(2, 4), stored=(1, 4)), BF16, 100)
    scaled = replace(classes, packing="scaled", classes=False)
    check_chunk(replace(chunk, coding=scaled, raw=(2, 0), stored=(2, 2, 0)), BF16, 100)


def test_chunk_of_an_empty_tensor_is_refused() -> None:
    with pytest.raises(Corrupt, match="covers 1 elements of a tensor of 0"):
        check_chunk(gaps_and_planes(1, 1, 1, nnz=1, span=1, raw=1), BF16, 0)


def test_damaged_streams_are_refused() -> None:
    chunk, coded = encode(np.arange(200, dtype=np.uint32), np.ones(200, "<u2"), 200)
    for wrong in (coded + b"\0", coded[:-1], b""):
        with pytest.raises(Corrupt, match="bytes of streams"):
            decode_chunk(chunk, BF16, wrong)
        with pytest.raises(Corrupt, match="bytes of streams"):
            check_streams(chunk, BF16, wrong)
    short = [bytes(200), compress_stream(bytes(199)), b""]
    damaged = gaps_and_planes(*map(len, short), nnz=200, span=200, raw=200)
    check_chunk(damaged, BF16, 200)
    for read in (decode_chunk, check_streams):
        with pytest.raises(Corrupt, match="holds 199 bytes, expected 200"):
            read(damaged, BF16, b"".join(short))
        with pytest.raises(Corrupt, match="compressed stream"):
            read(damaged, BF16, bytes(200) + b"\0" * len(short[1]))


def small_steps(span: int, share: float) -> tuple[Positions, Bits, Bits]:
    """Return positions that depend on the exponents before the change, codes of small steps, and the bits before."""
    draw = np.random.default_rng(7)
    before = (draw.normal(0, 0.02, span).astype("<f4").view("<u4") >> 16).astype("<u2")
    exponents = (before >> 7 & 255).astype(float)
    likely = np.minimum(0.8, share * 2.0 ** (121 - exponents))
    positions = np.flatnonzero(draw.random(span) < likely).astype(np.uint32)
    return positions, draw.choice(np.array([1, 2], "<u2"), len(positions)), before


def test_classes_are_made_where_they_save_a_tenth() -> None:
    span = 1 << 16
    positions, codes, bits = small_steps(span, 0.008)
    found, coded = encode(positions, codes, span, before=bits)
    alone, coded_alone = encode(positions, codes, span)
    assert (found.coding.index, found.coding.classes) == ("rice", True)
    assert not alone.coding.classes
    assert len(coded) <= 0.9 * len(coded_alone)
    assert_bit_equal(decode_chunk(found, BF16, coded, before=reader(bits))[0], positions)
    with pytest.raises(BaseNeeded, match="--standalone"):
        decode_chunk(found, BF16, coded)
    check_streams(found, BF16, coded)
    uniform, codes = sample(1000, span)
    assert not encode(uniform, codes, span, before=bits)[0].coding.classes


def test_fast_never_makes_classes_and_max_is_never_larger() -> None:
    span, sizes = 1 << 16, {}
    positions, codes, bits = small_steps(span, 0.008)
    for level in Level:
        chunk, coded = encode(positions, codes, span, level=level, before=bits)
        sizes[level] = len(coded)
        assert chunk.coding.classes == (level is not Level.FAST)
    assert sizes[Level.MAX] <= sizes[Level.DEFAULT] < sizes[Level.FAST]


def test_another_base_is_an_error_or_other_positions_never_more() -> None:
    positions, codes, bits = small_steps(1 << 16, 0.01)
    chunk, coded = encode(positions, codes, 1 << 16, before=bits)
    assert chunk.coding.classes
    noise = np.random.default_rng(8).integers(0, 1 << 16, 1 << 16).astype("<u2")
    for other in (bits[::-1].copy(), bits ^ np.uint16(0x80), noise):
        try:
            found, _ = decode_chunk(chunk, BF16, coded, before=reader(other))
        except Corrupt:
            continue
        assert len(found) == chunk.nnz
        assert (np.diff(found.astype(np.int64)) > 0).all()
        assert found[-1] < 1 << 16

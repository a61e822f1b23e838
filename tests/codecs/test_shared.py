"""Tests of every index encoding and value packing in the registries. New ones are included automatically."""

from __future__ import annotations

from collections.abc import Sequence

import _reference_bits
import numpy as np
import pytest
from helpers import assert_bit_equal

from sparsedelta.codecs.context import Bits, ChunkContext
from sparsedelta.codecs.exponent_classes import Keys, keys_of
from sparsedelta.codecs.indices import INDEX_ENCODINGS, Positions
from sparsedelta.codecs.packings import VALUE_PACKINGS
from sparsedelta.errors import Corrupt

SPAN, COLUMNS = 6000, 60
each_encoding = pytest.mark.parametrize("name", INDEX_ENCODINGS)
each_packing = pytest.mark.parametrize("name", VALUE_PACKINGS)

DRAW = np.random.default_rng(1)
BASE = (DRAW.normal(0, 0.02, SPAN).astype("<f4").view("<u4") >> 16).astype("<u2")
KEYS = keys_of(BASE)
CONTEXT = ChunkContext(lambda start, n: BASE[start : start + n], COLUMNS)


def masks() -> dict[str, Positions]:
    """Return positions of every kind for which an encoding exists."""
    rows, columns = np.divmod(np.arange(SPAN), COLUMNS)
    crowded = np.where(rows % 10 == 0, 0.5, 0.002) * np.where(columns % 7 == 0, 1.0, 0.3)
    likely = np.minimum(0.9, 0.02 * 2.0 ** (121.0 - KEYS))
    shares = {
        "sparse": np.full(SPAN, 0.005),
        "dense": np.full(SPAN, 0.5),
        "all": np.ones(SPAN),
        "crowded": crowded,
        "by exponent": likely,
        "whole rows": (rows % 9 == 0).astype(float),
    }
    drawn = {name: np.flatnonzero(DRAW.random(SPAN) < share) for name, share in shares.items()}
    return {name: positions.astype(np.uint32) for name, positions in drawn.items()}


def codes(width: int) -> dict[str, Bits]:
    """Return 500 codes of every kind for which a packing exists."""
    ones = DRAW.integers(1, 3, 500, np.uint64)
    some = np.where(DRAW.random(500) < 0.1, DRAW.integers(3, 60, 500, np.uint64), ones)
    wide = DRAW.integers(1, 1 << min(8 * width, 24), 500, np.uint64)
    longer = np.where(KEYS[:500] < 121, DRAW.integers(5, 12, 500, np.uint64), ones)
    found = {"ones": ones, "some longer": some, "longer by exponent": longer}
    found |= {"wide": wide, "zero": np.append(wide[1:], 0)}
    return {name: numbers.astype(f"<u{width}") for name, numbers in found.items()}


MASKS = masks()
CODES = {width: codes(width) for width in (1, 2, 4, 8)}


def streams(name: str) -> list[tuple[Positions, bytes, ChunkContext]]:
    """Return the streams of an encoding for all masks that it supports, without and with classes."""
    encoding = INDEX_ENCODINGS[name]
    found = []
    for classes in (False, True) if encoding.has_classes else (False,):
        context = CONTEXT.sorted(classes)
        for positions in MASKS.values():
            stream = encoding.encode(positions, SPAN, context)
            if stream is not None:
                found.append((positions, stream.tobytes(), context))
    return found


@each_encoding
def test_positions_come_back(name: str) -> None:
    encoding = INDEX_ENCODINGS[name]
    made = streams(name)
    assert {context.classes for *_, context in made} == {False, encoding.has_classes}
    for positions, stream, context in made:
        assert encoding.possible(len(stream), len(positions), SPAN)
        assert encoding.implied_bytes(SPAN) in (None, len(stream))
        decoded = encoding.decode(stream, len(positions), SPAN, context)
        assert decoded.dtype == np.uint32
        assert_bit_equal(decoded, positions)


@each_encoding
def test_damaged_index_streams_are_refused_or_positions_all_the_same(name: str) -> None:
    encoding = INDEX_ENCODINGS[name]
    draw = np.random.default_rng(2)
    for positions, stream, context in streams(name):
        for _ in range(60):
            damaged = bytearray(stream)
            if draw.random() < 0.3:
                del damaged[draw.integers(len(damaged)) :]
            else:
                damaged[draw.integers(len(damaged))] ^= 1 << int(draw.integers(8))
            nnz = len(positions) + int(draw.integers(-1, 2))
            if not 1 <= nnz <= SPAN or not encoding.possible(len(damaged), nnz, SPAN):
                continue
            try:
                found = encoding.decode(bytes(damaged), nnz, SPAN, context).astype(np.int64)
            except Corrupt:
                continue
            assert len(found) == nnz
            assert (np.diff(found) > 0).all()
            assert 0 <= found[0] <= found[-1] < SPAN


@each_encoding
def test_index_streams_are_the_formats(name: str) -> None:
    for positions, stream, context in streams(name):
        keys = KEYS.tolist() if context.classes else []
        found = _reference_bits.positions(name, stream, len(positions), SPAN, keys)
        assert found == positions.tolist()


def packed(name: str, width: int) -> list[tuple[Bits, Sequence[bytes], Keys | None]]:
    """Return the streams of a packing for all codes that it supports, without and with classes."""
    found: list[tuple[Bits, Sequence[bytes], Keys | None]] = []
    for keys in (None, KEYS[:500]) if VALUE_PACKINGS[name].has_classes else (None,):
        for numbers in CODES[width].values():
            made = VALUE_PACKINGS[name].encode(numbers, keys)
            if made is not None:
                found.append((numbers, [stream.tobytes() for stream in made], keys))
    return found


def stated(name: str, parts: Sequence[bytes]) -> int:
    """Return the raw size of a stream as the record of its chunk states it."""
    return len(parts[-1]) if VALUE_PACKINGS[name].states_size else 0


@each_packing
@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_codes_come_back(name: str, width: int) -> None:
    packing = VALUE_PACKINGS[name]
    assert packed(name, width)
    for numbers, parts, keys in packed(name, width):
        n_bytes = stated(name, parts)
        assert packing.possible(n_bytes, 500, width)
        sizes = packing.stream_sizes(n_bytes, 500, width)
        # A plane of zeros is not stored.
        assert [len(part) or size for part, size in zip(parts, sizes, strict=True)] == [*sizes]
        decoded = packing.decode(parts, 500, width, keys)
        assert decoded.dtype == numbers.dtype
        assert_bit_equal(decoded, numbers)


@each_packing
def test_damaged_value_streams_are_refused_or_codes_all_the_same(name: str) -> None:
    draw = np.random.default_rng(3)
    packing = VALUE_PACKINGS[name]
    for numbers, parts, keys in packed(name, 2):
        for _ in range(100):
            damaged = [bytearray(part) for part in parts]
            one = damaged[int(draw.integers(len(damaged)))]
            if not one:
                continue
            if one is damaged[-1] and packing.states_size and draw.random() < 0.3:
                del one[draw.integers(len(one)) :]
            else:
                one[draw.integers(len(one))] ^= 1 << int(draw.integers(8))
            whole = [bytes(part) for part in damaged]
            if not packing.possible(stated(name, whole), 500, 2):
                continue
            try:
                found = packing.decode(whole, 500, 2, keys)
            except Corrupt:
                continue
            assert (found.dtype, found.shape) == (numbers.dtype, numbers.shape)


@each_packing
@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_value_streams_are_the_formats(name: str, width: int) -> None:
    for numbers, parts, keys in packed(name, width):
        sizes = VALUE_PACKINGS[name].stream_sizes(stated(name, parts), 500, width)
        whole = [part or bytes(size) for part, size in zip(parts, sizes, strict=True)]
        listed = [] if keys is None else keys.tolist()
        assert _reference_bits.codes(name, whole, 500, width, listed) == numbers.tolist()


def test_packings_of_one_kind_of_codes_leave_others_alone() -> None:
    numbers = CODES[4]
    assert VALUE_PACKINGS["steps"].encode(numbers["zero"], None) is None  # 0 is no step
    assert VALUE_PACKINGS["scaled"].encode(numbers["ones"], None) is None
    assert (
        VALUE_PACKINGS["steps"].encode(numbers["ones"], KEYS[:500]) is None
    )  # classes save nothing
    high = np.full(9, 1 << 32, "<u8")
    assert VALUE_PACKINGS["steps"].encode(high, None) is None
    assert VALUE_PACKINGS["scaled"].encode(high, None) is None

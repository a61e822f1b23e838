"""The streams of PULSEPT1, versions 2 and 3: bytes that basilica-sdk 0.36.8 wrote, round trips, and damaged streams."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest

from sparsedelta.errors import Corrupt
from sparsedelta.interop.pulse_streams import (
    decode_by_exponent,
    decode_gaps,
    decode_rice,
    decode_values,
    encode_by_exponent,
    encode_gaps,
    encode_rice,
    encode_values,
)

# Each was written by the code of basilica-sdk 0.36.8.
FAR = (
    bytes.fromhex("0006000000e7bfffffffdf36420f00"),
    [3, 4, 9, 1_000_000],
)  # the last one is escaped
OLD = np.array([0x3F80] * 5 + [0xBF80, 1, 2, 0x4000, 0x3F81], np.uint16)
MOST = (
    bytes.fromhex("0200000100000000000000007f0102000000060000000001000000f3"),
    [0, 1, 2, 3, 6, 7, 9],  # all of exponent 0, and most of exponent 127
)
BEFORE = np.array([0x3F80, 0x3F80, 0xFFFF, 0x8000, 0x3F80, 0x3F80], np.uint16)
AFTER = np.array([0x3F81, 0x3F7F, 0, 0, 0x3FFF, 0x3F00], np.uint16)
STEPS = bytes.fromhex("020102fffeffffffff00")


def test_streams_that_the_other_code_wrote() -> None:
    assert decode_rice(FAR[0], 4, 1_000_001).tolist() == FAR[1]
    with pytest.raises(Corrupt):
        decode_rice(FAR[0], 4, 1_000_000)
    assert decode_by_exponent(MOST[0], 7, OLD).tolist() == MOST[1]
    assert encode_by_exponent(np.array(MOST[1]), OLD) == MOST[0]
    assert np.array_equal(decode_values(STEPS, BEFORE), AFTER)
    assert encode_values(BEFORE, AFTER) == STEPS


Case = tuple[np.ndarray, np.ndarray, np.ndarray]


def cases(n: int) -> list[Case]:
    """Return old bits, the indices that change, and the new bits there."""
    draw = np.random.default_rng(0)
    found = []
    for number in range(n):
        size = int(draw.choice([1, 2, 9, 300, 5000]))
        old = draw.integers(0, 1 << 16, size, np.uint16)
        if number % 2:
            old = (draw.normal(0, 0.02, size).astype(np.float32).view(np.uint32) >> 16).astype(
                np.uint16
            )
        density = draw.choice([0.001, 0.1, 0.5, 0.9, 1])
        indices = np.flatnonzero(draw.random(size) < density)
        limit = 4 if number % 3 else 1 << 16
        found.append(
            (old, indices, old[indices] + draw.integers(1, limit, len(indices), np.uint16))
        )
    return found


@pytest.mark.parametrize("number", range(0, 60, 20))
def test_there_and_back(number: int) -> None:
    for old, indices, new in cases(60)[number : number + 20]:
        n = len(indices)
        for found in (
            decode_gaps(encode_gaps(indices), n, len(old)),
            decode_rice(encode_rice(indices), n, len(old)),
            decode_by_exponent(encode_by_exponent(indices, old), n, old),
        ):
            assert found.dtype == np.int64
            assert np.array_equal(found, indices)
        assert np.array_equal(decode_values(encode_values(old[indices], new), old[indices]), new)


def readers(
    old: np.ndarray, indices: np.ndarray, new: np.ndarray
) -> list[tuple[bytes, Callable[[bytes], np.ndarray]]]:
    """Return each stream of a change, and the function that reads it."""
    n, before = len(indices), old[indices]

    def rice(data: bytes) -> np.ndarray:
        return decode_rice(data, n, len(old))

    def by_exponent(data: bytes) -> np.ndarray:
        return decode_by_exponent(data, n, old)

    def values(data: bytes) -> np.ndarray:
        return decode_values(data, before)

    return [
        (encode_rice(indices), rice),
        (encode_by_exponent(indices, old), by_exponent),
        (encode_values(before, new), values),
    ]


def test_damaged_streams_are_refused_or_give_positions_in_order() -> None:
    draw = random.Random(0)
    n_refused = 0
    for old, indices, new in cases(60):
        if not len(indices):
            continue
        before = old[indices]
        for number, (stream, read) in enumerate(readers(old, indices, new)):
            for _ in range(30):
                data = bytearray(stream)
                data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
                if draw.random() < 0.2:
                    del data[draw.randrange(len(data)) :]
                try:
                    found = read(bytes(data))
                except Corrupt:
                    n_refused += 1
                    continue
                assert len(found) == len(before)
                if number < 2:
                    assert found[0] >= 0
                    assert found[-1] < len(old)
                    assert (np.diff(found) > 0).all()
    assert n_refused > 2000


@pytest.mark.parametrize(
    "read",
    [
        lambda: decode_rice(b"\x00" + b"\xff" * 4 + bytes(1 << 20), 5, 100),
        lambda: decode_rice(b"\x1f" + bytes(4) + bytes(1 << 20), 1 << 31, 1 << 31),
        lambda: decode_rice(bytes(5), 1 << 40, 100),
        lambda: decode_gaps(bytes(4) + b"\xff" * 6, 2, 1 << 31),
        lambda: decode_gaps(bytes(4) + b"\xff" * 4, 2, 1 << 31),
        lambda: decode_by_exponent(b"\xff\xff", 1, OLD),
        lambda: decode_by_exponent(
            b"\x01\x00\x7f\x00" + b"\xff" * 4 + b"\x05\0\0\0" + bytes(5), 1, OLD
        ),
    ],
)
def test_stated_counts_take_no_memory(read: Callable[[], object]) -> None:
    tracemalloc.start()
    with pytest.raises(Corrupt):
        read()
    assert tracemalloc.get_traced_memory()[1] < 1 << 24
    tracemalloc.stop()

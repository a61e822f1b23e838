"""Index streams: exact bytes, and every damage is detected before a position is used."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import assert_bit_equal

from sparsedelta.codecs.indices import INDEX_ENCODINGS, Positions
from sparsedelta.errors import Corrupt


def positions(*values: int) -> Positions:
    return np.array(values, np.uint32)


CASES = [
    ("gaps", [0], 1, b"\0"),
    ("gaps", [2, 3, 289, 290], 300, bytes.fromhex("0200ff1e00")),
    ("gaps", [254], 255, b"\xfe"),
    ("gaps", [255], 256, b"\xff\0"),
    ("gaps", [510, 511], 512, b"\xff\xff\0\0"),
    ("gaps", [0, 255, 511], 600, b"\0\xfe\xff\0"),
    ("bitmap", [0], 1, b"\x01"),
    ("bitmap", [0, 7, 8, 10], 11, b"\x81\x05"),
    ("bitmap", [15], 16, b"\0\x80"),
    ("rice", [2, 3, 289, 290], 300, bytes.fromhex("0008050274 00030c")),
    ("rice", [0, 1, 2], 3, b"\0\1"),
]


@pytest.mark.parametrize(("name", "values", "span", "stream"), CASES)
def test_exact_bytes(name: str, values: list[int], span: int, stream: bytes) -> None:
    encoding, wanted = INDEX_ENCODINGS[name], positions(*values)
    encoded = encoding.encode(wanted, span)
    assert encoded is not None
    assert encoded.tobytes() == stream
    assert encoding.possible(len(stream), len(values), span)
    assert encoding.implied_bytes(span) in (None, len(stream))
    decoded = encoding.decode(stream, len(values), span)
    assert decoded.dtype == np.uint32
    assert_bit_equal(decoded, wanted)


def test_another_parameter_than_the_best_is_read() -> None:
    found = INDEX_ENCODINGS["rice"].decode(bytes.fromhex("00080602d001c3"), 4, 300)
    assert found.tolist() == [2, 3, 289, 290]


def test_registry_is_the_formats() -> None:
    assert set(INDEX_ENCODINGS) == {"gaps", "bitmap", "rice", "tiles"}


@pytest.mark.parametrize(
    ("name", "stream", "nnz", "span"),
    [
        ("gaps", b"\0\xff", 1, 300),  # ends with a skip
        ("gaps", b"\0\0", 1, 300),  # one too many
        ("gaps", b"\0\xff\0", 3, 300),  # one too few
        ("gaps", b"\x05", 1, 5),  # outside the span
        ("gaps", b"\xff" * 3 + b"\0", 1, 765),
        ("bitmap", b"\x03", 1, 8),
        ("bitmap", b"\x01", 2, 8),
        ("bitmap", b"\x09", 2, 3),  # a padding bit
        ("rice", b"\1\x78\0\1", 3, 3),  # thresholds in a chunk without classes
        ("rice", b"\0\1", 2, 3),  # all of them, which are more
        ("rice", b"\0\1\0", 3, 3),  # a byte that follows
        ("rice", b"\0\2\0\2", 2, 300),  # one gap, for two positions
    ],
)
def test_damage_is_refused(name: str, stream: bytes, nnz: int, span: int) -> None:
    with pytest.raises(Corrupt):
        INDEX_ENCODINGS[name].decode(stream, nnz, span)


def test_sums_beyond_32_bits_do_not_wrap() -> None:
    tokens = np.full((1 << 32) // 255 + 2, 255, np.uint8)
    tokens[-1] = 0
    with pytest.raises(Corrupt, match="leaves its span"):
        INDEX_ENCODINGS["gaps"].decode(tokens.tobytes(), 1, 1 << 24)


@pytest.mark.parametrize(
    ("name", "nnz", "span", "sizes"),
    [
        ("gaps", 3, 1000, [3, 4, 5, 6]),
        ("gaps", 3, 254, [3]),
        ("bitmap", 3, 8, [1]),
        ("bitmap", 3, 9, [2]),
    ],
)
def test_possible_sizes(name: str, nnz: int, span: int, sizes: list[int]) -> None:
    encoding = INDEX_ENCODINGS[name]
    assert [n for n in range(2000) if encoding.possible(n, nnz, span)] == sizes


@pytest.mark.parametrize("span", [1, 50, 1 << 12, 1 << 24])
def test_some_quick_encoding_is_worth_trying_at_every_density(span: int) -> None:
    for nnz in {1, 2, span // 2000, span // 100, span // 16, span - 1, span}:
        if 1 <= nnz <= span:
            assert any(
                e.worth_trying(nnz, span) and e.is_quick(nnz, span)
                for e in INDEX_ENCODINGS.values()
            )

"""Index streams: exact bytes, every damage found before a position is believed."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import assert_bit_equal

from sparsedelta.codecs.indices import INDEX_ENCODINGS, Positions
from sparsedelta.errors import Corrupt


def positions(*values: int) -> Positions:
    return np.array(values, np.uint32)


def wide(*tokens: int) -> bytes:
    return bytes(t & 255 for t in tokens) + bytes(t >> 8 for t in tokens)


CASES = [
    ("gap8", [0], 1, b"\0"),
    ("gap8", [2, 3, 289, 290], 300, bytes.fromhex("0200ff1e00")),
    ("gap8", [254], 255, b"\xfe"),
    ("gap8", [255], 256, b"\xff\0"),
    ("gap8", [510, 511], 512, b"\xff\xff\0\0"),
    ("gap8", [0, 255, 511], 600, b"\0\xfe\xff\0"),
    ("gap16", [0], 1, wide(0)),
    ("gap16", [2, 3, 289, 65_000], 70_000, wide(2, 0, 285, 64_710)),
    ("gap16", [65_534], 65_535, wide(65_534)),
    ("gap16", [65_535], 65_536, wide(65_535, 0)),
    ("gap16", [131_071, 131_072], 1 << 18, wide(65_535, 65_535, 1, 0)),
    ("bitmap", [0], 1, b"\x01"),
    ("bitmap", [0, 7, 8, 10], 11, b"\x81\x05"),
    ("bitmap", [15], 16, b"\0\x80"),
    ("rice", [2, 3, 289, 290], 300, bytes.fromhex("0805027400030c")),
    ("all", [0], 1, b""),
    ("all", [0, 1, 2], 3, b""),
]


@pytest.mark.parametrize(("name", "values", "span", "stream"), CASES)
def test_exact_bytes(name: str, values: list[int], span: int, stream: bytes) -> None:
    encoding, wanted = INDEX_ENCODINGS[name], positions(*values)
    encoded = encoding.encode(wanted, span)
    assert encoded is not None
    assert encoded.tobytes() == stream
    assert encoding.possible(len(stream), len(values), span)
    decoded = encoding.decode(stream, len(values), span)
    assert decoded.dtype == np.uint32
    assert_bit_equal(decoded, wanted)


def test_registry_is_the_formats() -> None:
    assert set(INDEX_ENCODINGS) == {
        "gap8",
        "gap16",
        "bitmap",
        "all",
        "rice",
        "tiles",
        "exponent",
    }


@pytest.mark.parametrize(
    ("name", "stream", "nnz", "span"),
    [
        ("gap8", b"\0\xff", 1, 300),  # ends with a skip
        ("gap8", b"\0\0", 1, 300),  # one too many
        ("gap8", b"\0\xff\0", 3, 300),  # one too few
        ("gap8", b"\x05", 1, 5),  # outside the span
        ("gap8", b"\xff" * 3 + b"\0", 1, 765),
        ("gap16", wide(0, 65_535), 1, 1 << 20),
        ("gap16", wide(0, 0), 1, 1 << 20),
        ("gap16", wide(5), 1, 5),
        ("gap16", wide(65_535, 65_535, 0), 1, 131_070),
        ("bitmap", b"\x03", 1, 8),
        ("bitmap", b"\x01", 2, 8),
        ("bitmap", b"\x09", 2, 3),  # a padding bit
    ],
)
def test_damage_is_refused(name: str, stream: bytes, nnz: int, span: int) -> None:
    with pytest.raises(Corrupt):
        INDEX_ENCODINGS[name].decode(stream, nnz, span)


@pytest.mark.parametrize("name", ["gap8", "gap16"])
def test_sums_beyond_32_bits_do_not_wrap(name: str) -> None:
    width = 1 if name == "gap8" else 2
    n_tokens = (1 << 32) // ((1 << 8 * width) - 1) + 2
    tokens = np.full(n_tokens, (1 << 8 * width) - 1, f"<u{width}")
    tokens[-1] = 0
    stream = tokens.view(np.uint8).reshape(-1, width).T.tobytes()
    with pytest.raises(Corrupt, match="leaves its span"):
        INDEX_ENCODINGS[name].decode(stream, 1, 1 << 24)


@pytest.mark.parametrize(
    ("name", "nnz", "span", "sizes"),
    [
        ("gap8", 3, 1000, [3, 4, 5, 6]),
        ("gap8", 3, 254, [3]),
        ("gap16", 3, 1000, [6]),
        ("gap16", 3, 65_535 * 2, [6, 8, 10]),
        ("bitmap", 3, 8, [1]),
        ("bitmap", 3, 9, [2]),
        ("all", 9, 9, [0]),
        ("all", 8, 9, []),
    ],
)
def test_possible_sizes(name: str, nnz: int, span: int, sizes: list[int]) -> None:
    encoding = INDEX_ENCODINGS[name]
    assert [n for n in range(2000) if encoding.possible(n, nnz, span)] == sizes


@pytest.mark.parametrize("span", [1, 50, 1 << 12, 1 << 24])
def test_some_encoding_is_worth_trying_at_every_density(span: int) -> None:
    for nnz in {1, 2, span // 2000, span // 100, span // 16, span - 1, span}:
        if 1 <= nnz <= span:
            assert any(e.worth_trying(nnz, span) for e in INDEX_ENCODINGS.values() if e.is_quick)

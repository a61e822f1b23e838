"""All encodings agree, at every density and for every bit pattern."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from helpers import BITS, assert_bit_equal
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from strategies import relaxed

from sparsedelta.codecs.chunk import Span, check_chunk, decode_chunk, encode_chunk
from sparsedelta.codecs.context import ChunkContext
from sparsedelta.codecs.indices import INDEX_ENCODINGS, Positions
from sparsedelta.codecs.values import VALUE_ENCODINGS
from sparsedelta.codecs.zstd import Level
from sparsedelta.dtypes import DTYPES

each_encoding = pytest.mark.parametrize("encoding", VALUE_ENCODINGS)


@st.composite
def positions(draw: st.DrawFn) -> tuple[Positions, int]:
    """Draw positions in a span, of a density from one in all to all, alone or in runs."""
    span = draw(st.sampled_from([1, 2, 7, 8, 9, 255, 256, 257, 4000, 65_536, 70_000, 1 << 18]))
    nnz = draw(st.integers(1, span) | st.integers(1, min(span, 300)))
    seed = draw(st.integers(0, 1 << 32))
    if draw(st.booleans()):
        start = draw(st.integers(0, span - nnz))
        return np.arange(start, start + nnz, dtype=np.uint32), span
    chosen = np.random.default_rng(seed).choice(span, nnz, replace=False, shuffle=False)
    return np.sort(chosen).astype(np.uint32), span


@relaxed(150)
@given(positions(), st.integers(0, 99), st.sampled_from([0, 2, 7, 64, 1000]))
def test_all_index_encodings_decode_what_they_encode(
    drawn: tuple[Positions, int], seed: int, columns: int
) -> None:
    wanted, span = drawn
    bits = np.random.default_rng(seed).normal(0, 0.02, span).astype("<f4").view("<u4")
    context = ChunkContext(
        lambda start, n: bits[start : start + n], columns, seed % max(columns, 1)
    )
    for name, encoding in INDEX_ENCODINGS.items():
        for classes in (False, True) if encoding.has_classes else (False,):
            encoded = encoding.encode(wanted, span, context.sorted(classes))
            if encoded is None:
                assert classes or not encoding.is_quick(len(wanted), span)
                continue
            stream = encoded.tobytes()
            assert encoding.implied_bytes(span) in (None, len(stream))
            assert encoding.possible(len(stream), len(wanted), span), name
            decoded = encoding.decode(stream, len(wanted), span, context.sorted(classes))
            assert_bit_equal(decoded, wanted)


@relaxed(120)
@given(
    positions(),
    st.sampled_from(sorted(BITS)),
    st.integers(0, 63),
    st.integers(0, 99),
    st.sampled_from(Level),
    st.sampled_from([0, 1, 12_345]),
)
def test_chunks_decode_what_they_encode(
    drawn: tuple[Positions, int], name: str, n_bits: int, seed: int, level: Level, start: int
) -> None:
    wanted, span = drawn
    dtype = DTYPES[name]
    draw = np.random.default_rng(seed)
    high = (1 << min(n_bits + 1, 8 * dtype.width)) - 1
    codes = draw.integers(0, high, len(wanted), np.uint64, endpoint=True).astype(dtype.view)
    bits = draw.integers(0, 1 << 63, min(span, 4096), np.uint64).astype(dtype.view)
    whole = np.resize(bits, span)

    def before(start: int, n: int) -> npt.NDArray[Any]:
        return whole[start : start + n]

    place = Span(start, span, columns=64, before=before)
    chunk, streams = encode_chunk(place, wanted, codes, values="ulp", touched=None, level=level)
    check_chunk(chunk, dtype, start + span)
    found, found_codes = decode_chunk(chunk, dtype, b"".join(streams), before=before)
    assert_bit_equal(found, wanted)
    assert_bit_equal(found_codes, codes)


def assert_exact(
    encoding: str, name: str, before: npt.NDArray[Any], after: npt.NDArray[Any]
) -> None:
    dtype, coding = DTYPES[name], VALUE_ENCODINGS[encoding]
    assert_bit_equal(
        coding.decode(dtype, before, coding.encode(dtype, before, after)), after.copy()
    )


@each_encoding
@pytest.mark.parametrize("name", [name for name in BITS if DTYPES[name].width == 1])
def test_all_pairs_of_bytes(name: str, encoding: str) -> None:
    before, after = (a.ravel() for a in np.meshgrid(*[np.arange(256, dtype=np.uint8)] * 2))
    assert_exact(encoding, name, before, after)
    codes = VALUE_ENCODINGS[encoding].encode(DTYPES[name], before, after)
    for b in (0, 1, 127, 128, 255):  # from one value every code leads to another value
        assert len(np.unique(codes[before == b])) == 256
    if encoding == "ulp":
        assert_bit_equal(codes == 0, before == after)


@st.composite
def bit_pairs(draw: st.DrawFn) -> tuple[str, npt.NDArray[Any], npt.NDArray[Any]]:
    """Draw values before and after, random or special."""
    name = draw(st.sampled_from([name for name in BITS if DTYPES[name].width > 1]))
    width = DTYPES[name].width
    top = 1 << (8 * width - 1)
    special = [0, 1, top - 1, top, top + 1, 2 * top - 1, 0x7F << (8 * width - 8)]
    values = st.integers(0, 2 * top - 1) | st.sampled_from(special)
    pair = hnp.arrays(DTYPES[name].view, (2, draw(st.integers(1, 9))), elements=values)
    before, after = draw(pair)
    return name, before, after


@each_encoding
@relaxed(150)
@given(drawn=bit_pairs())
def test_pairs_of_wider_values(
    encoding: str, drawn: tuple[str, npt.NDArray[Any], npt.NDArray[Any]]
) -> None:
    assert_exact(encoding, *drawn)


@each_encoding
@pytest.mark.parametrize("name", [name for name in BITS if DTYPES[name].width > 1])
def test_many_random_pairs(name: str, encoding: str) -> None:
    draw = np.random.default_rng(7)
    view = DTYPES[name].view
    before, after = np.frombuffer(draw.bytes(2 * 100_000 * view.itemsize), view).reshape(2, -1)
    assert_exact(encoding, name, before, after)
    near = before + draw.integers(0, 3, len(before)).astype(view)
    assert_exact(encoding, name, before, near)


def finite(name: str) -> npt.NDArray[Any]:
    """Return the bits of all finite values of a 16-bit or half of a 16-bit float, in their order."""
    bits = np.arange(1 << 16, dtype=np.uint32)
    if name == "F16":
        values = bits.astype("<u2").view(np.float16).astype(np.float64)
    elif name == "BF16":
        with np.errstate(invalid="ignore"):  # signalling NaNs
            values = (bits << 16).astype("<u4").view(np.float32).astype(np.float64)
    else:  # F8_E5M2: the upper byte of an F16
        bits = bits[:256]
        values = (bits << 8).astype("<u2").view(np.float16).astype(np.float64)
    kept = np.isfinite(values)
    order = np.lexsort((~np.signbit(values[kept]), values[kept]))
    return bits[kept][order].astype(DTYPES[name].view)


@pytest.mark.parametrize("name", ["F16", "BF16", "F8_E5M2"])
def test_next_larger_value_is_one_ulp_away(name: str) -> None:
    bits = finite(name)
    dtype, ulp = DTYPES[name], VALUE_ENCODINGS["ulp"]
    assert set(ulp.encode(dtype, bits[:-1], bits[1:]).tolist()) == {2}
    assert set(ulp.encode(dtype, bits[1:], bits[:-1]).tolist()) == {1}


@pytest.mark.parametrize(("name", "kind"), [("F32", np.float32), ("F64", np.float64)])
@relaxed(200)
@given(data=st.data())
def test_ulp_follows_the_order_of_wide_floats(name: str, kind: Any, data: st.DataObject) -> None:
    floats = st.floats(width=32 if kind is np.float32 else 64, allow_nan=False)
    x, y = (np.array([data.draw(floats)], kind) for _ in range(2))
    dtype, ulp = DTYPES[name], VALUE_ENCODINGS["ulp"]

    def distance(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> int:
        code = int(ulp.encode(dtype, a.view(dtype.view), b.view(dtype.view))[0])
        return code // 2 if code % 2 == 0 else -(code + 1) // 2

    if bool(np.signbit(x) == np.signbit(y)):  # otherwise they may be more than half around apart
        assert np.sign(distance(x, y)) == np.sign((y > x).astype(int) - (y < x).astype(int))[0]
    if x[0] != 0 and x[0] < np.finfo(kind).max:
        assert distance(x, np.nextafter(x, np.array([np.inf], kind))) == 1

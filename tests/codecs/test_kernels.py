"""The compiled kernels and numpy: the same bytes and the same refusals, whatever they are given."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from helpers import BITS, assert_bit_equal

from sparsedelta.codecs import kernels
from sparsedelta.codecs.chunk import Chunk, Span, decode_chunk, encode_chunk
from sparsedelta.codecs.context import ChunkContext, Positions, StartBits
from sparsedelta.codecs.exponent_classes import keys_of
from sparsedelta.codecs.indices import INDEX_ENCODINGS
from sparsedelta.codecs.packings import VALUE_PACKINGS
from sparsedelta.codecs.values import VALUE_ENCODINGS, change, differences
from sparsedelta.codecs.zstd import Level
from sparsedelta.dtypes import DTYPES, DType
from sparsedelta.errors import Corrupt

native = kernels.native
pytestmark = pytest.mark.skipif(native is None, reason="the kernels are not built")
Bits = npt.NDArray[Any]


@contextmanager
def numpy_alone() -> Iterator[None]:
    kernels.native = None
    try:
        yield
    finally:
        kernels.native = native


def both(work: Callable[..., Any], *arguments: Any) -> tuple[object, object]:
    """Return what some work comes to in either way: plain bytes and numbers, or a refusal."""

    def outcome() -> object:
        try:
            return plain(work(*arguments))
        except Corrupt:
            return "refused"

    kernels.native = native
    compiled = outcome()
    with numpy_alone():
        return compiled, outcome()


def plain(result: Any) -> object:
    if isinstance(result, np.ndarray):
        return result.dtype.str, result.tobytes()
    if isinstance(result, tuple | list):
        return [plain(one) for one in result]
    return result


def drawn(seed: int, width: int) -> tuple[Positions, Bits, Bits]:
    """Return positions in a span, codes there, and the bits of the span before the change."""
    draw = np.random.default_rng(seed)
    span = int(draw.choice([1, 63, 64, 65, 700, 5000, (1 << 18) + 77]))
    view = f"<u{width}"
    before = (draw.normal(0, 0.02, span).astype("<f4").view("<u4") >> 16).astype(view)
    if width > 2:
        before <<= before.dtype.type(8 * (width - 2))
    exponents = keys_of(before).astype(float)
    share = float(draw.choice([0.001, 0.02, 0.3, 1.0]))
    likely = share if draw.random() < 0.4 else np.minimum(0.97, share * 2.0 ** (121 - exponents))
    if draw.random() < 0.3:
        likely = likely * np.where(np.arange(span) // 64 % 7 == 0, 1.0, 0.05)
    positions = np.flatnonzero(draw.random(span) < likely).astype(np.uint32)
    if not len(positions):
        positions = np.array([span - 1], np.uint32)
    high = int(draw.choice([3, 9, 200, 1 << 16, 1 << 40]))
    codes = draw.integers(1, min(high, 1 << 8 * width), len(positions), np.uint64)
    codes[draw.random(len(codes)) < draw.choice([0.1, 0.7])] = 1
    return positions, codes.astype(view), before


def reader(bits: Bits) -> StartBits:
    return lambda start, n: bits[start : start + n]


def encoded(place: Span, positions: Positions, codes: Bits, level: Level) -> tuple[Chunk, bytes]:
    chunk, streams = encode_chunk(place, positions, codes, values="ulp", touched=None, level=level)
    return chunk, b"".join(streams)


@pytest.mark.parametrize("name", ["I8", "BF16", "F32", "F64"])
def test_encoders_make_the_same_chunk(name: str) -> None:
    dtype = DTYPES[name]
    for seed in range(40):
        positions, codes, before = drawn(seed, dtype.width)
        place = Span(0, len(before), 64, reader(before))
        for level in (Level.FAST, Level.DEFAULT):
            compiled, reference = both(encoded, place, positions, codes, level)
            assert compiled == reference
            chunk, coded = encoded(place, positions, codes, level)
            found, numbers = decode_chunk(chunk, dtype, coded, before=reader(before))
            assert_bit_equal(found, positions)
            assert_bit_equal(numbers, codes)


def damaged(stream: bytes, draw: np.random.Generator) -> bytes:
    """Return a stream with a few bits changed, cut short, lengthened, or another altogether."""
    kind = draw.integers(6)
    raw = bytearray(stream)
    if kind == 0:
        return draw.bytes(int(draw.integers(1, 40)))
    if kind == 1:
        del raw[int(draw.integers(len(raw))) :]
    elif kind == 2:
        raw += draw.bytes(int(draw.integers(1, 12)))
    else:
        for _ in range(kind - 2):
            raw[int(draw.integers(min(len(raw), 60 if kind == 4 else len(raw))))] ^= 1 << int(
                draw.integers(8)
            )
    return bytes(raw)


@pytest.mark.parametrize("name", INDEX_ENCODINGS)
def test_index_decoders_agree_on_any_stream(name: str) -> None:
    encoding, draw = INDEX_ENCODINGS[name], np.random.default_rng(5)
    n_read = n_refused = 0
    for seed in range(60):
        positions, _, before = drawn(seed, 2)
        span, bits = len(before), reader(before)
        for classes in {False, encoding.has_classes}:
            context = ChunkContext(bits, 64, classes=classes)
            stream = encoding.encode(positions, span, context)
            if stream is None:
                continue
            for number in range(20):
                context = ChunkContext(bits, classes=classes)
                raw = damaged(stream.tobytes(), draw) if number else stream.tobytes()
                nnz = len(positions) + int(draw.choice([0, 0, 0, 1, -1]))
                if not (1 <= nnz <= span and encoding.possible(len(raw), nnz, span)):
                    continue
                compiled, reference = both(encoding.decode, raw, nnz, span, context)
                assert compiled == reference, (seed, number)
                n_refused += compiled == "refused"
                n_read += compiled != "refused"
    assert n_read > 20
    assert n_refused > 100


@pytest.mark.parametrize("name", VALUE_PACKINGS)
@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_value_decoders_agree_on_any_stream(name: str, width: int) -> None:
    packing, draw = VALUE_PACKINGS[name], np.random.default_rng(6)
    n_read = n_refused = 0
    for seed in range(80):
        positions, codes, before = drawn(seed, width)
        for keys in (None, keys_of(before[positions])) if packing.has_classes else (None,):
            made = packing.encode(codes, keys)
            if made is None:
                continue
            for number in range(12):
                whole = [stream.tobytes() for stream in made]
                which = int(draw.integers(len(whole)))
                if number and whole[which]:
                    whole[which] = damaged(whole[which], draw)
                stated = len(whole[-1]) if packing.states_size else 0
                sizes = packing.stream_sizes(stated, len(codes), width)
                if not packing.possible(stated, len(codes), width) or any(
                    len(part) != size and (part or name != "planes")
                    for part, size in zip(whole, sizes, strict=True)
                ):
                    continue
                compiled, reference = both(packing.decode, whole, len(codes), width, keys)
                assert compiled == reference, (seed, number)
                n_refused += compiled == "refused"
                n_read += compiled != "refused"
    assert n_read > 20
    assert n_refused > 20 or name == "planes"


def compared(dtype: DType, before: Bits, after: Bits, values: str) -> object:
    """Return all that is made on the way from one block to the other and back."""
    places = np.zeros(len(before) + 3, np.uint32)
    old, new = differences(before, after, 7, places)
    positions, encoding = places[: len(old)], VALUE_ENCODINGS[values]
    codes = encoding.encode(dtype, old, new)
    bits = before.copy()
    changed = change(dtype, bits, 7, positions, values, codes)
    assert_bit_equal(bits, after)
    for one, other in zip(changed, (old, new), strict=True):
        assert_bit_equal(one, other)
    return positions, old, new, codes, encoding.decode(dtype, old, codes)


@pytest.mark.parametrize("values", VALUE_ENCODINGS)
@pytest.mark.parametrize("name", BITS)
def test_values_are_compared_coded_and_changed_alike(name: str, values: str) -> None:
    dtype, draw = DTYPES[name], np.random.default_rng(7)
    for n in (1, 63, 64, 1000):
        before, other = np.frombuffer(draw.bytes(2 * n * dtype.width), dtype.view).reshape(2, n)
        after = np.where(draw.random(n) < 0.4, other, before)
        compiled, reference = both(compared, dtype, before, after, values)
        assert compiled == reference


def test_sizes_that_do_not_fit_are_refused() -> None:
    assert native is not None
    four, bits = np.zeros(4, np.uint32), np.zeros(4, "<u2")
    state = np.zeros((1, 4), np.int64)
    far = np.array([[0, 1 << 40, 0, 0]], np.int64)
    outside = np.array([9], np.uint32)
    keys = np.zeros(4, np.uint8)
    none = np.zeros(256, np.uint8)
    calls: list[tuple[str, tuple[Any, ...]]] = [
        ("shifted_sum", (four, 32)),
        ("pack", (four, 32, keys)),
        ("pack", (four, 5, keys)),
        ("unpack", (keys, 32, four)),
        ("put_unary", (outside, 0, keys[:1], 0)),
        ("decode_rice", (keys, np.array([[4, 31]]), four)),
        ("decode_rice", (keys, np.array([[-1, 0]]), four)),
        ("decode_rice", (keys, np.array([4, 0, 0]), four)),
        ("gaps_between", (four, four[:3])),
        ("numbers_from", (four, 9, four[:3])),
        ("put_bits", (outside, keys[:1])),
        ("put_cells", (outside, np.zeros(1, np.int64), np.zeros(1, np.int64), 2, 0, 8, keys)),
        ("keys_of", (bits, keys[:3])),
        ("find_chosen", (bits, 0, b"", far, keys, four, keys, 0)),
        ("find_chosen", (bits, 0, b"", state, np.zeros(16, np.uint8), four, keys, 5)),
        ("find_chosen", (bits, 0, b"\5\5", state, np.zeros(16, np.uint8), four, keys, 0)),
        ("rank_chosen", (bits, 0, b"", far, four, four)),
        ("rank_chosen", (bits, 0, b"", state, outside, four)),
        ("step_statistics", (bits, keys, np.zeros(767, np.int64))),
        ("count_keys", (keys, np.zeros(255, np.int64))),
        ("sort_codes", (bits, keys, none, np.array([9]), bits.copy())),
        ("long_steps", (bits, four[:3], four.copy())),
        ("join_steps", (keys[:1], b"", none, far, four, four, bits)),
        ("join_steps", (keys[:1], b"", none, state, four, four, bits)),  # no mark at the end
        ("encode_values", (bits, bits[:3], 1, bits.copy())),
        ("compare", (bits, bits, 0, four[:3], bits.copy(), bits.copy())),
        ("change", (bits.copy(), 0, outside, bits[:1], 1, bits[:1].copy(), bits[:1].copy())),
        ("change", (bits.copy(), 5, four[:1], bits[:1], 1, bits[:1].copy(), bits[:1].copy())),
    ]
    for name, arguments in calls:
        with pytest.raises(ValueError, match="sizes of arrays do not match"):
            getattr(native, name)(*arguments)
        with pytest.raises(TypeError):
            getattr(native, name)(*arguments, None)


def test_environment_leaves_the_compiled_ones_out() -> None:
    code = "from sparsedelta.codecs import kernels; print(kernels.in_use())"
    for wanted, expected in (("", "compiled"), ("numpy", "numpy")):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "SPARSEDELTA_KERNELS": wanted},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == expected

"""The compiled kernels and numpy write the same bytes and reject the same streams."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np
import pytest
from helpers import BITS, assert_bit_equal
from kernel_cases import Bits, both, damaged, drawn, encoded, native, reader

from sparsedelta.codecs.chunk import MAX_SPAN, Span, decode_chunk
from sparsedelta.codecs.context import ChunkContext
from sparsedelta.codecs.exponent_classes import keys_of
from sparsedelta.codecs.indices import INDEX_ENCODINGS
from sparsedelta.codecs.packings import VALUE_PACKINGS
from sparsedelta.codecs.values import VALUE_ENCODINGS, change, differences
from sparsedelta.codecs.zstd import Level
from sparsedelta.dtypes import DTYPES, DType

pytestmark = pytest.mark.skipif(native is None, reason="the kernels are not built")


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


@pytest.mark.parametrize(
    "positions",
    [[0], [MAX_SPAN - 1], [0, MAX_SPAN - 1], [*range(1000), MAX_SPAN - 1], [*range(0, 5000, 7)]],
)
def test_rice_streams_of_uneven_gaps_are_the_same(positions: list[int]) -> None:
    rice, given = INDEX_ENCODINGS["rice"], np.array(positions, np.uint32)
    compiled, reference = both(rice.encode, given, MAX_SPAN)
    assert compiled == reference
    stream = rice.encode(given, MAX_SPAN)
    assert stream is not None
    assert_bit_equal(rice.decode(stream.tobytes(), len(given), MAX_SPAN), given)


@pytest.fixture(params=range(3))
def instructions(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run a test with each set of instructions that the processor has."""
    assert native is not None
    best = native.use_instructions(9)
    assert native.use_instructions(request.param) == min(request.param, best)
    yield
    native.use_instructions(best)


def test_every_set_of_instructions_gives_the_same_classes(instructions: None) -> None:
    rice = INDEX_ENCODINGS["rice"]
    n_streams = 0
    for seed in range(60):
        positions, _, before = drawn(seed, 2)
        context = ChunkContext(reader(before), classes=True)
        compiled, reference = both(rice.encode, positions, len(before), context)
        assert compiled == reference
        stream = rice.encode(positions, len(before), context)
        if stream is not None:
            found = rice.decode(stream.tobytes(), len(positions), len(before), context)
            assert_bit_equal(found, positions)
            n_streams += 1
    assert n_streams > 5


@pytest.mark.parametrize("width", [1, 2])
def test_every_set_of_instructions_gives_the_same_steps(width: int, instructions: None) -> None:
    steps, draw = VALUE_PACKINGS["steps"], np.random.default_rng(8)
    n_refused = 0
    for seed in range(30):
        positions, codes, before = drawn(seed, width, (700, 5000, 40_000))
        for keys in (None, keys_of(before[positions])):
            compiled, reference = both(steps.encode, codes, keys)
            assert compiled == reference
            made = steps.encode(codes, keys) or ()
            for number in range(6 * len(made)):
                raw = damaged(made[0].tobytes(), draw) if number else made[0].tobytes()
                compiled, reference = both(steps.decode, [raw], len(codes), width, keys)
                assert compiled == reference, (seed, number)
                n_refused += compiled == "refused"
    assert n_refused > 20


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
    """Return all results of comparing two blocks, and of changing one to the other and back."""
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
def test_values_are_compared_coded_and_changed_alike(
    name: str, values: str, instructions: None
) -> None:
    dtype, draw = DTYPES[name], np.random.default_rng(7)
    for n, share in product((1, 63, 64, 1000), (0.02, 0.4, 1)):
        before, other = np.frombuffer(draw.bytes(2 * n * dtype.width), dtype.view).reshape(2, n)
        after = np.where(draw.random(n) < share, other, before)
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


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("shifted_sum", (np.zeros(4, np.uint64), 0)),
        ("shifted_sum", (np.zeros(4, np.float32), 0)),
        ("shifted_sum", (np.zeros(4, ">u4"), 0)),
        ("shifted_sum", (np.zeros(8, np.uint32)[::2], 0)),
        ("shifted_sum", (4, 0)),
        ("keys_of", (np.zeros(4, "c8"), np.zeros(4, np.uint8))),
        ("keys_of", (np.zeros(4, np.uint16), b"abcd")),
        ("gaps_between", (np.zeros(4, np.uint32), np.zeros(4, np.int64))),
        ("put_bits", (np.zeros(4, np.uint32), np.zeros(8, np.uint8)[::2])),
    ],
)
def test_arrays_of_another_kind_are_refused(name: str, arguments: tuple[Any, ...]) -> None:
    """Arguments: wrong item size, floats, wrong byte order, gaps between items, no array, read-only."""
    with pytest.raises((TypeError, ValueError, BufferError), match=r"array|bytes-like|writ"):
        getattr(native, name)(*arguments)


def asked(wanted: str) -> subprocess.CompletedProcess[str]:
    code = "from sparsedelta.codecs import kernels; print(kernels.in_use())"
    environment = {**os.environ, "SPARSEDELTA_KERNELS": wanted}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("wanted", "expected"), [("", "compiled"), ("compiled", "compiled"), ("numpy", "numpy")]
)
def test_environment_chooses_the_kernels(wanted: str, expected: str) -> None:
    assert asked(wanted).stdout.strip() == expected


def test_environment_with_another_word_is_refused() -> None:
    done = asked("off")
    assert done.returncode == 1
    assert "SPARSEDELTA_KERNELS is 'off'; set it to compiled or numpy" in done.stderr

"""Codes, streams and damage for comparing the compiled kernels with numpy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from sparsedelta.codecs import kernels
from sparsedelta.codecs.chunk import Chunk, Span, encode_chunk
from sparsedelta.codecs.context import Positions, StartBits
from sparsedelta.codecs.exponent_classes import keys_of
from sparsedelta.codecs.zstd import Level
from sparsedelta.errors import Corrupt

native = kernels.native
Bits = npt.NDArray[Any]
Draw = np.random.Generator
SPANS = (1, 63, 64, 65, 700, 5000)
LARGE_SPANS = (*SPANS, (1 << 18) + 77)  # more than one block


@contextmanager
def numpy_alone() -> Iterator[None]:
    """Turn the compiled kernels off."""
    kernels.native = None
    try:
        yield
    finally:
        kernels.native = native


def both(work: Callable[..., Any], *arguments: Any) -> tuple[object, object]:
    """Return the outcome of ``work`` with the compiled kernels and with numpy: plain data, or ``"refused"``."""

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
    """Return arrays as their dtypes and bytes, so that ``==`` compares every bit."""
    if isinstance(result, np.ndarray):
        return result.dtype.str, result.tobytes()
    if isinstance(result, tuple | list):
        return [plain(one) for one in result]
    return result


def drawn(
    seed: int, width: int, spans: Sequence[int] = LARGE_SPANS
) -> tuple[Positions, Bits, Bits]:
    """Return positions in a span, codes there, and the bits of the span before the change."""
    draw = np.random.default_rng(seed)
    span = int(draw.choice(spans))
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
    """Return a function that reads a span of these elements."""
    return lambda start, n: bits[start : start + n]


def encoded(place: Span, positions: Positions, codes: Bits, level: Level) -> tuple[Chunk, bytes]:
    """Return a chunk's record and its stored streams, end to end."""
    chunk, streams = encode_chunk(place, positions, codes, values="ulp", touched=None, level=level)
    return chunk, b"".join(streams)


def damaged(stream: bytes, draw: Draw) -> bytes:
    """Return a stream with a few bits changed, cut short, lengthened, or replaced by random bytes."""
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

"""Zstandard frames as FORMAT §8 allows them: the raw size is known before anything is decompressed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from enum import Enum
from typing import TypeVar

import zstandard

from sparsedelta.errors import Corrupt, LimitExceeded

MAX_WINDOW_BYTES = 1 << 27
_SKIPPABLE_MAGIC = range(0x184D2A50, 0x184D2A60)

# Index and value streams are nearly random. Short matches in them are coincidences and cost more than they
# save. A long minimum match and a tiny hash table leave the work to the entropy coder.
# target_length must be 0: with any other value, zstd's fast strategy does not compress literals.
_ENTROPY = zstandard.ZstdCompressionParameters(
    strategy=zstandard.STRATEGY_FAST,
    window_log=20,
    hash_log=6,
    chain_log=6,
    search_log=1,
    min_match=7,
    target_length=0,
)
_MATCHES = zstandard.ZstdCompressionParameters.from_level(5, window_log=20)
_THOROUGH = zstandard.ZstdCompressionParameters.from_level(19, window_log=24)
_SMALLEST_FRAME = 9  # bytes; every zstd frame with content is larger
_COMPRESSIBLE = 0.9  # below this ratio, the stream may have repetition, so matches are searched
_SAMPLE_BYTES = 1 << 15
_MATCHES_SAVE = (
    0.98  # of the entropy coder's frame of a sample; else the search is not worth its time
)
_TEXT_LEVEL = 15
# Limits for texts and side files, so that a hostile file cannot expand without bound.
MAX_EXPANSION, _EXPANSION_EXTRA = 64, 1 << 10

T = TypeVar("T")

_local = threading.local()


class Level(Enum):
    """How much time the search for a smaller delta may take."""

    FAST = "fast"
    DEFAULT = "default"
    MAX = "max"


def compress_stream(data: bytes | memoryview, level: Level = Level.DEFAULT) -> bytes:
    """Return an index stream or a value stream as it is stored: one zstd frame, or unchanged if the frame is not smaller.

    Level ``DEFAULT`` searches for repetition where it is likely, level ``MAX`` always.
    """
    if len(data) <= _SMALLEST_FRAME:
        return bytes(data)
    frame = _compressor("entropy", _ENTROPY).compress(data)
    others = []
    if len(frame) < _COMPRESSIBLE * len(data) and (
        level is Level.MAX or (level is Level.DEFAULT and _repeats(data))
    ):
        others.append(_compressor("matches", _MATCHES).compress(data))
    if level is Level.MAX:
        others.append(_compressor("thorough", _THOROUGH).compress(data))
    return min([bytes(data), frame, *others], key=len)


def _repeats(data: bytes | memoryview) -> bool:
    """Return whether a search for repetition will make a stream smaller; in a long stream, three samples are tested."""
    if len(data) <= 4 * _SAMPLE_BYTES:
        return True
    last = len(data) - _SAMPLE_BYTES
    samples = [data[at : at + _SAMPLE_BYTES] for at in (0, last // 2, last)]
    sizes = [
        sum(len(_compressor(name, parameters).compress(sample)) for sample in samples)
        for name, parameters in (("matches", _MATCHES), ("entropy", _ENTROPY))
    ]
    return sizes[0] < _MATCHES_SAVE * sizes[1]


def compress_text(data: bytes) -> bytes:
    """Return a text or a side file as it is stored: one zstd frame, or unchanged.

    It is unchanged if the frame is not smaller, or would expand more than a reader accepts.
    """
    frame = zstandard.ZstdCompressor(level=_TEXT_LEVEL).compress(data)
    return frame if len(frame) < len(data) <= max_expanded(len(frame)) else data


def max_expanded(n_stored: int) -> int:
    """Return how many bytes a frame of a text or a side file may hold (FORMAT §8)."""
    return MAX_EXPANSION * n_stored + _EXPANSION_EXTRA


def check_expansion(n_bytes: int, n_stored: int) -> None:
    """Check that a text or a side file does not expand more than allowed.

    Raises:
        LimitExceeded: it expands more.
    """
    if n_bytes > max_expanded(n_stored):
        raise LimitExceeded(
            f"{n_bytes} bytes are stored in {n_stored}; at most {MAX_EXPANSION} times as many are allowed"
        )


def decompress(frame: bytes | memoryview, n_bytes: int) -> bytes:
    """Return the ``n_bytes`` bytes, at least one, that one frame holds.

    Raises:
        Corrupt: the frame is damaged, states another size or none, needs a dictionary, needs a window
            above the limit, or is followed by other bytes.
    """
    found = content_bytes(frame)
    if found != n_bytes:
        raise Corrupt(f"compressed stream holds {found} bytes, expected {n_bytes}")
    try:
        decompressor = _of_thread("decompressor", zstandard.ZstdDecompressor)
        raw: bytes = decompressor.decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise Corrupt(f"compressed stream is damaged: {error}") from error
    if len(raw) != n_bytes:
        raise Corrupt(f"compressed stream holds {len(raw)} bytes, expected {n_bytes}")
    return raw


def content_bytes(frame: bytes | memoryview) -> int:
    """Check the header of a frame, and return the raw size that it states.

    Raises:
        Corrupt: there is no frame, the frame is skippable, states no size, needs a dictionary, or needs a window
            above the limit.
    """
    if len(frame) < 4 or int.from_bytes(frame[:4], "little") in _SKIPPABLE_MAGIC:
        raise Corrupt("compressed stream does not begin with a zstd data frame")
    try:
        header = zstandard.get_frame_parameters(frame)
        size = zstandard.frame_content_size(frame)
    except zstandard.ZstdError as error:
        raise Corrupt(f"compressed stream has a damaged header: {error}") from error
    if size < 0:
        raise Corrupt("compressed stream does not state its size")
    if header.dict_id:
        raise Corrupt(f"compressed stream asks for dictionary {header.dict_id}, expected none")
    if header.window_size > MAX_WINDOW_BYTES:
        raise Corrupt(f"compressed stream asks for a window of {header.window_size} bytes")
    return int(size)


def _compressor(
    name: str, parameters: zstandard.ZstdCompressionParameters
) -> zstandard.ZstdCompressor:
    return _of_thread(name, lambda: zstandard.ZstdCompressor(compression_params=parameters))


def _of_thread(name: str, make: Callable[[], T]) -> T:
    """Return this thread's context of that name. Contexts are slow to create, and threads cannot share them."""
    if not hasattr(_local, name):
        setattr(_local, name, make())
    found: T = getattr(_local, name)
    return found

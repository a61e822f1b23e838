"""Only frames that FORMAT §8 allows are accepted, and none is decompressed before its size is checked."""

from __future__ import annotations

import random
import threading

import pytest
import zstandard

from sparsedelta.codecs.zstd import (
    Level,
    check_expansion,
    compress_stream,
    compress_text,
    content_bytes,
    decompress,
)
from sparsedelta.errors import Corrupt, LimitExceeded

DATA = random.Random(0).randbytes(200) + bytes(2000)
FRAME = zstandard.ZstdCompressor().compress(DATA)
EMPTY = zstandard.ZstdCompressor().compress(b"")
SKIPPABLE = b"\x50\x2a\x4d\x18\x04\0\0\0abcd"


@pytest.mark.parametrize("compress", [compress_stream, compress_text])
@pytest.mark.parametrize("n", [0, 1, 255, 256, 70_000, 1 << 20])
def test_what_is_written_is_read(compress: object, n: int) -> None:
    assert callable(compress)
    for data in (bytes(n), random.Random(n).randbytes(n), (b"abcdefg" * n)[:n]):
        stored = compress(data)
        if len(stored) == len(data):
            assert stored == data
            continue
        assert len(stored) < len(data)
        parameters = zstandard.get_frame_parameters(stored)
        assert parameters.content_size == content_bytes(stored) == n
        assert parameters.dict_id == 0
        assert parameters.window_size <= 1 << 27
        assert decompress(stored, n) == data


def test_what_a_frame_makes_no_smaller_stays_as_it_is() -> None:
    noise = random.Random(0).randbytes(5000)
    for level in Level:
        for data in (b"", b"a", b"\0" * 3, noise):
            assert compress_stream(data, level) == compress_text(data) == data
        assert len(compress_stream(bytes(5000), level)) < 50


def test_texts_expand_no_more_than_a_reader_accepts() -> None:
    for n in (1 << 10, 1 << 17, 1 << 20):
        stored = compress_text(bytes(n))
        assert n <= 64 * len(stored) + 1024
        check_expansion(n, len(stored))
    assert len(compress_text(bytes(1 << 10))) < 100  # within what any frame may hold
    assert compress_text(bytes(1 << 20)) == bytes(1 << 20)
    assert len(compress_stream(bytes(1 << 20))) < 100  # streams are limited by their chunk
    check_expansion(64 * 100 + 1024, 100)
    with pytest.raises(LimitExceeded, match="at most 64 times"):
        check_expansion(64 * 100 + 1025, 100)


def test_writing_is_deterministic() -> None:
    frames = set()
    pieces = [random.Random(i % 3).randbytes(5000) + bytes(9000) for i in range(30)]

    def compress_all() -> None:
        frames.add(tuple(compress_stream(piece) for piece in pieces))
        frames.add(tuple(compress_stream(piece) for piece in reversed(pieces))[::-1])

    threads = [threading.Thread(target=compress_all) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(frames) == 1


def test_other_size_than_expected() -> None:
    for expected in (0, len(DATA) - 1, len(DATA) + 1):
        with pytest.raises(Corrupt, match=f"holds {len(DATA)} bytes, expected {expected}"):
            decompress(FRAME, expected)


def test_every_truncation_is_refused() -> None:
    for n in range(len(FRAME)):
        with pytest.raises(Corrupt):
            decompress(FRAME[:n], len(DATA))


@pytest.mark.parametrize("extra", [b"\0", FRAME, SKIPPABLE, EMPTY])
def test_something_after_the_frame_is_refused(extra: bytes) -> None:
    with pytest.raises(Corrupt):
        decompress(FRAME + extra, len(DATA))


def test_something_before_the_frame_is_refused() -> None:
    for before in (b"\0", SKIPPABLE):
        with pytest.raises(Corrupt):
            decompress(before + FRAME, len(DATA))


def test_no_stated_size_is_refused() -> None:
    compressor = zstandard.ZstdCompressor(write_content_size=False)
    with pytest.raises(Corrupt, match="does not state its size"):
        decompress(compressor.compress(DATA), len(DATA))


def test_wrong_checksum_is_refused() -> None:
    frame = zstandard.ZstdCompressor(write_checksum=True).compress(DATA)
    assert decompress(frame, len(DATA)) == DATA
    with pytest.raises(Corrupt, match="damaged"):
        decompress(frame[:-1] + bytes([frame[-1] ^ 1]), len(DATA))


def test_dictionary_is_refused() -> None:
    samples: list[bytes | bytearray | memoryview] = [
        random.Random(i).randbytes(40) + b"common words " * 5 for i in range(400)
    ]
    dictionary = zstandard.train_dictionary(4096, samples)
    frame = zstandard.ZstdCompressor(dict_data=dictionary).compress(DATA)
    with pytest.raises(Corrupt, match="asks for dictionary"):
        decompress(frame, len(DATA))


def test_large_window_is_refused() -> None:
    # Window descriptor 0x90 is 2^28, 0x88 is 2^27; a raw last block of one byte follows.
    for descriptor, accepted in ((0x88, True), (0x89, False), (0x90, False)):
        frame = bytes.fromhex(f"28b52ffd 80 {descriptor:02x} 01000000 090000 41")
        if accepted:
            assert decompress(frame, 1) == b"A"
        else:
            with pytest.raises(Corrupt, match="window"):
                decompress(frame, 1)


def test_size_stated_larger_than_the_content_is_refused() -> None:
    frame = bytes.fromhex("28b52ffd 20 05 210000 01020304")
    with pytest.raises(Corrupt):
        decompress(frame, 5)

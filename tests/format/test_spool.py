"""The spool gives back what was put in, whatever order and thread it came in."""

from __future__ import annotations

import gc
import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from sparsedelta.codecs.chunk import Chunk, Coding
from sparsedelta.format import spool as spool_module
from sparsedelta.format.manifest import read_text
from sparsedelta.format.records import Stored
from sparsedelta.format.spool import SpoolPayload


@pytest.fixture(params=["memory", "file"])
def spool(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[SpoolPayload]:
    if request.param == "file":
        monkeypatch.setattr(spool_module, "_MEMORY_BYTES", 16)
    made = SpoolPayload(str(tmp_path))
    yield made
    made.close()


def chunk(data: bytes) -> Chunk:
    coding = Coding("ulp", "gaps", "planes", classes=False)
    return Chunk(0, 1, 1, coding, (1,), (len(data),), bytes(16), None)


def test_what_is_added_is_found_where_its_record_says(spool: SpoolPayload) -> None:
    one = spool.add_chunk(chunk(b"onetwo"), [b"one", b"", b"two"])
    text, noise = b"x" * 1000, random.Random(0).randbytes(100)
    framed, plain = spool.add_text(text), spool.add_text(noise)
    moved = spool.add_stored(Stored(9, 5, 77), b"coded")
    assert (one.offset, one) == (0, chunk(b"onetwo"))  # the offset is no part of what is compared
    assert spool.read(one.offset, 6) == b"onetwo"
    assert (framed.n_bytes, framed.offset) == (1000, 6)
    assert framed.stored_bytes < 100
    assert read_text(spool.read(framed.offset, framed.stored_bytes), 1000) == text
    assert (plain.n_bytes, plain.stored_bytes) == (100, 100)
    assert spool.read(plain.offset, 100) == noise
    assert (moved.n_bytes, moved.stored_bytes) == (9, 5)
    assert spool.read(moved.offset, 5) == b"coded"


def test_every_range(spool: SpoolPayload) -> None:
    whole = b"abcdefghi"
    spool.add_stored(Stored(9, 9, -1), b"-" * 9)
    start = spool.add_stored(Stored(9, 9, -1), whole).offset
    spool.add_stored(Stored(9, 9, -1), b"-" * 9)
    for begin in range(len(whole) + 1):
        for end in range(begin, len(whole) + 1):
            assert spool.read(start + begin, end - begin) == whole[begin:end]


def test_threads(spool: SpoolPayload) -> None:
    wanted = [random.Random(i).randbytes(3000) for i in range(8)]
    found: dict[int, list[int]] = {i: [] for i in range(8)}

    def fill(number: int) -> None:
        for start in range(0, 3000, 100):
            piece = wanted[number][start : start + 100]
            placed = spool.add_chunk(chunk(piece), [piece[:50], piece[50:]])
            assert spool.read(placed.offset, 100) == piece
            found[number].append(placed.offset)

    threads = [threading.Thread(target=fill, args=[number]) for number in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, offsets in found.items():
        assert b"".join(spool.read(offset, 100) for offset in offsets) == wanted[number]


def test_forgotten_spool_closes_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool_module, "_MEMORY_BYTES", 16)
    gc.collect()  # what other tests have left
    n_open = len(os.listdir("/dev/fd"))
    spool = SpoolPayload()
    spool.add_chunk(chunk(b"x" * 100), [b"x" * 100])
    del spool  # a warning would be an error here
    gc.collect()
    assert len(os.listdir("/dev/fd")) == n_open


def test_temporary_file_is_gone_after_close(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool_module, "_MEMORY_BYTES", 16)
    spool = SpoolPayload(str(tmp_path))
    spool.add_chunk(chunk(b"x" * 100), [b"x" * 100])
    spool.close()
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="closed"):
        spool.read(0, 1)

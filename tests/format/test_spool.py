"""The spool gives back each entry whole, whatever order and thread its pieces came in."""

from __future__ import annotations

import gc
import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from sparsedelta.format import spool as spool_module
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


def test_pieces_of_entries_are_joined(spool: SpoolPayload) -> None:
    spool.append("a", [b"one", b"two"])
    spool.append("b", [b"x" * 100])
    spool.append("a", [])
    spool.append("a", [b"three"])
    assert [spool.n_bytes(key) for key in ("a", "b", "c")] == [11, 100, 0]
    assert spool.read("a", 0, 11) == b"onetwothree"
    assert spool.read("b", 0, 100) == b"x" * 100
    spool.check()


def test_every_range(spool: SpoolPayload) -> None:
    pieces = [b"abc", b"", b"defgh", b"i"]
    for piece in pieces:
        spool.append("a", [piece])
        spool.append("b", [b"-" * 9])
    whole = b"".join(pieces)
    for begin in range(len(whole) + 1):
        for end in range(begin, len(whole) + 1):
            assert spool.read("a", begin, end - begin) == whole[begin:end]


def test_threads(spool: SpoolPayload) -> None:
    wanted = {str(i): random.Random(i).randbytes(3000) for i in range(8)}

    def fill(key: str) -> None:
        for start in range(0, 3000, 100):
            spool.append(key, [wanted[key][start : start + 50], wanted[key][start + 50 :][:50]])
            assert spool.read(key, start, 100) == wanted[key][start : start + 100]

    threads = [threading.Thread(target=fill, args=[key]) for key in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {key: spool.read(key, 0, 3000) for key in wanted} == wanted


def test_forgotten_spool_closes_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool_module, "_MEMORY_BYTES", 16)
    n_open = len(os.listdir("/dev/fd"))
    spool = SpoolPayload()
    spool.append("a", [b"x" * 100])
    del spool  # a warning would be an error here
    gc.collect()
    assert len(os.listdir("/dev/fd")) == n_open


def test_temporary_file_is_gone_after_close(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool_module, "_MEMORY_BYTES", 16)
    spool = SpoolPayload(str(tmp_path))
    spool.append("a", [b"x" * 100])
    spool.close()
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="closed"):
        spool.read("a", 0, 1)

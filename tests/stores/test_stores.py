"""What every store of objects guarantees, tested with each kind of store."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from stores.conftest import KINDS, Pair, make_url

from sparsedelta.errors import LimitExceeded
from sparsedelta.stores import open_store
from sparsedelta.stores.objects import ObjectStore
from sparsedelta.stores.ranges import READ_AHEAD_BYTES

# The client of the Hub uses a deprecated function of its HTTP library.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

CONTENT = bytes(range(256)) * (READ_AHEAD_BYTES // 64)  # binary, and four times what is read ahead


def test_create_keeps_what_is_there(pair: Pair) -> None:
    writer, reader = pair.writer, pair.reader
    assert (writer.writable, writer.has_create) == (True, True)
    assert reader.read("a/b.json", 10) is None
    assert reader.open("a/b.json") is None
    assert writer.create("a/b.json", b"one")
    assert not writer.create("a/b.json", b"two")
    assert reader.read("a/b.json", 3) == b"one"


def test_write_replaces(pair: Pair) -> None:
    writer, reader = pair.writer, pair.reader
    for content in (b"one", b"", b"three", b"three"):
        writer.write("a/b.json", content)
        assert reader.read("a/b.json", 9) == content
    assert not writer.create("a/b.json", b"two")
    with pytest.raises(LimitExceeded, match=r"a/b\.json' has more than 4 bytes"):
        reader.read("a/b.json", 4)


def test_delete(pair: Pair) -> None:
    writer, reader = pair.writer, pair.reader
    writer.write("a/c", b"1")
    writer.delete("a/c")
    writer.delete("a/c")
    assert reader.read("a/c", 1) is None
    assert writer.create("a/c", b"2")
    assert reader.read("a/c", 1) == b"2"


def test_files_and_ranges(pair: Pair, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(CONTENT)
    assert pair.writer.create("deltas/0000000001-ab.sd", file)
    assert not pair.writer.create("deltas/0000000001-ab.sd", file)
    pair.writer.write("deltas/2.sd", file)
    source = pair.reader.open("deltas/0000000001-ab.sd")
    assert source is not None
    assert source.name.endswith("deltas/0000000001-ab.sd") or "@" in source.name
    n = len(CONTENT)
    assert source.n_bytes == n
    ranges = [(0, 5), (n - 3, 9), (n, 1), (7, READ_AHEAD_BYTES), (1000, 3), (50, n), (1001, 2)]
    with ThreadPoolExecutor(4) as pool:
        found = [*pool.map(lambda one: source.read(*one), ranges)]
    assert found == [CONTENT[at : at + size] for at, size in ranges]
    source.close()
    assert pair.reader.read("deltas/2.sd", n) == CONTENT


def test_list(store: ObjectStore) -> None:
    assert store.list("") == []
    for name in ("a/b.json", "a/c", "d"):
        store.write(name, b"1")
    assert store.list("") == ["a/b.json", "a/c", "d"]
    assert (store.list("a/"), store.list("a/b"), store.list("e/")) == (
        ["a/b.json", "a/c"],
        ["a/b.json"],
        [],
    )
    store.delete("a/c")
    assert store.list("a/") == ["a/b.json"]
    store.close()


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_names(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    store = open_store(make_url(kind, request, tmp_path))
    calls: list[Callable[[str], object]] = [
        lambda name: store.read(name, 1),
        store.open,
        lambda name: store.create(name, b""),
        lambda name: store.write(name, b""),
        store.delete,
    ]
    for name in (
        "",
        "/a",
        "a/",
        "a//b",
        "..",
        "a/../b",
        ".a",
        "a\\b",
        "a b",
        "ä",
        "a" * 600,
        "a\n",
    ):
        for call in calls:
            with pytest.raises(ValueError, match="cannot name an object"):
                call(name)


def test_of_several_creates_one_succeeds(store: ObjectStore) -> None:
    with ThreadPoolExecutor(8) as pool:
        for n in range(3):
            start = threading.Barrier(8)

            def create(k: int, n: int = n, start: threading.Barrier = start) -> bool:
                start.wait()
                return store.create(f"v/{n}", b"%d" % k * 999)

            done = [*pool.map(create, range(8))]
            assert sum(done) == 1
            assert store.read(f"v/{n}", 9999) == b"%d" % done.index(True) * 999


def test_readers_see_whole_objects(pair: Pair) -> None:
    contents = [CONTENT, CONTENT[::-1], b"small"]
    pair.writer.write("o", contents[0])
    done = threading.Event()

    def read() -> int:
        n_read = 0
        while not done.is_set():
            assert pair.reader.read("o", len(CONTENT)) in contents
            n_read += 1
        return n_read

    with ThreadPoolExecutor(2) as pool:
        readers = [pool.submit(read) for _ in range(2)]
        try:
            for n in range(6):
                pair.writer.write("o", contents[n % 3])
        finally:
            done.set()
        assert sum(reader.result() for reader in readers) > 0


def test_memory_among_threads(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Its create is two steps: check, then write.
    looks = MemoryFileSystem.exists

    def slowly(self: MemoryFileSystem, path: str, **options: object) -> bool:
        found = bool(looks(self, path, **options))
        time.sleep(0.01)
        return found

    monkeypatch.setattr(MemoryFileSystem, "exists", slowly)
    url = make_url("memory", request, tmp_path)
    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(lambda _: open_store(url).create("v", b"1"), range(4))) == 1

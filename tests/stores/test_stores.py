"""What every store of objects promises, tried with each kind."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sparsedelta.errors import LimitExceeded
from sparsedelta.stores import open_store
from sparsedelta.stores.objects import ObjectStore


@pytest.fixture
def store(tmp_path: Path) -> ObjectStore:
    return open_store(tmp_path / "store")


def test_objects_by_name(store: ObjectStore, tmp_path: Path) -> None:
    assert store.read("a/b.json", 10) is None
    assert store.open("a/b.json") is None
    assert store.create("a/b.json", b"one")
    assert not store.create("a/b.json", b"two")
    assert store.read("a/b.json", 3) == b"one"
    store.write("a/b.json", b"three")
    source = store.open("a/b.json")
    assert source is not None
    assert (source.n_bytes, source.read(1, 2), source.read(3, 9), source.read(5, 1)) == (
        5,
        b"hr",
        b"ee",
        b"",
    )
    source.close()
    with pytest.raises(LimitExceeded, match="5 bytes; expected at most 4"):
        store.read("a/b.json", 4)
    (tmp_path / "file").write_bytes(b"0123")
    store.write("a/c", tmp_path / "file")
    assert store.create("d", tmp_path / "file")
    assert (store.read("a/c", 9), store.read("d", 9)) == (b"0123", b"0123")
    assert store.list("") == ["a/b.json", "a/c", "d"]
    assert (store.list("a/"), store.list("a/b"), store.list("e/")) == (
        ["a/b.json", "a/c"],
        ["a/b.json"],
        [],
    )
    store.delete("a/c")
    store.delete("a/c")
    assert store.list("a/") == ["a/b.json"]
    store.close()


def test_one_of_several_creates(store: ObjectStore) -> None:
    assert store.has_create
    with ThreadPoolExecutor(8) as pool:
        for n in range(5):
            done = [*pool.map(lambda k, n=n: store.create(f"v/{n}", b"%d" % k * 999), range(8))]
            assert sum(done) == 1
            assert store.read(f"v/{n}", 9999) == b"%d" % done.index(True) * 999

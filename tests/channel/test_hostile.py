"""Channels that are damaged, swapped, truncated, huge or endless: one sentence, bounded memory, nothing changed."""

from __future__ import annotations

import dataclasses
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3
from channel.parties import MemoryStore
from channel.weights import is_at, weights

import sparsedelta
from sparsedelta.channel.entry import Entry, Object
from sparsedelta.channel.layout import CHANNEL, HEAD, entry_name, object_name
from sparsedelta.errors import BadVersion, Behind, ChannelError

MIB = 1 << 20


def published(store: Any, n: int) -> sparsedelta.Channel:
    """Return a channel of n versions of a state."""
    channel = sparsedelta.Channel(store)
    state = weights(1)
    with sparsedelta.Publisher(channel, state, anchor_ratio=None) as publisher:
        for step in range(1, n + 1):
            for name, tensor in weights(step).items():
                state[name].copy_(tensor)
            publisher.publish(step).result()
    return channel


class Place:
    """A follower of a model in memory or of a file on disk, which holds version 2 of a channel."""

    def __init__(self, kind: str, folder: Path, store: MemoryStore) -> None:
        self.held: Any = weights(1) if kind == "model" else folder / "out"
        self.follower = sparsedelta.Follower(sparsedelta.Channel(store), self.held)
        self.follower.sync(2)

    def fails(self, version: int | None = None) -> str:
        """Return the error of a sync; nothing may have changed."""
        with pytest.raises(ChannelError) as caught:
            self.follower.sync(version)
        message = str(caught.value)
        assert is_at(self.held, 2)
        assert self.follower.version == 2
        assert "\n" not in message
        assert len(message) < 500
        return f"{type(caught.value).__name__}: {message}"


@pytest.fixture
def store() -> MemoryStore:
    made = MemoryStore()
    published(made, 4)
    return made


@pytest.fixture(params=["model", "disk"])
def place(request: pytest.FixtureRequest, tmp_path: Path, store: MemoryStore) -> Place:
    return Place(request.param, tmp_path, store)


def name_of(store: MemoryStore, version: int, kind: Any = "deltas") -> str:
    entry = sparsedelta.Channel(store).entry(version)
    found = entry.delta if kind == "deltas" else entry.anchor
    assert found
    return object_name(kind, version, found)


def replace_entry(store: MemoryStore, version: int, **members: Any) -> None:
    """Replace an entry, and let those after it follow it."""
    channel = sparsedelta.Channel(store)
    head = channel.head()
    assert head
    entry = dataclasses.replace(channel.entry(version), **members)
    store.objects[entry_name(version)] = entry.raw
    for number in range(version + 1, head.version + 1):
        entry = dataclasses.replace(channel.entry(number), previous=entry.digest)
        store.objects[entry_name(number)] = entry.raw


class TestObjects:
    def test_swapped(self, store: MemoryStore, place: Place) -> None:
        one, other = name_of(store, 3), name_of(store, 4)
        store.objects[one], store.objects[other] = store.objects[other], store.objects[one]
        assert "is not what the entry of version 3 names" in place.fails()

    @pytest.mark.parametrize("n_left", [0, 1, 100, -1])
    def test_truncated(self, store: MemoryStore, place: Place, n_left: int) -> None:
        store.objects[name_of(store, 3)] = store.objects[name_of(store, 3)][:n_left]
        assert "is damaged" in place.fails()

    def test_longer(self, store: MemoryStore, place: Place) -> None:
        store.objects[name_of(store, 3)] += bytes(100)
        assert "is damaged" in place.fails()

    def test_another_delta_that_the_entry_names(self, store: MemoryStore, place: Place) -> None:
        """The delta is sound and fits, but makes another version than the entry says."""
        state = weights(2)
        with sparsedelta.diff(state, weights(4)) as delta:
            data = delta.to_bytes()
        named = Object(blake3(data).digest(), len(data))
        store.objects[object_name("deltas", 3, named)] = data
        replace_entry(store, 3, delta=named)
        found = place.fails(3)
        assert found.startswith("BadVersion: version 3 cannot be made: the last delta has a target")

    def test_no_delta(self, store: MemoryStore, place: Place) -> None:
        data = b"no delta" * 1000
        named = Object(blake3(data).digest(), len(data))
        store.objects[object_name("deltas", 3, named)] = data
        replace_entry(store, 3, delta=named)
        assert place.fails(3).startswith("BadVersion: version 3 cannot be made: ")

    def test_a_delta_on_another_version(self, store: MemoryStore, place: Place) -> None:
        """The touched values are those of version 2, too, but others would not be those of version 3."""
        with sparsedelta.diff(weights(3), weights(4)) as delta:
            data = delta.to_bytes()
        named = Object(blake3(data).digest(), len(data))
        store.objects[object_name("deltas", 3, named)] = data
        target = sparsedelta.Channel(store).entry(4).target
        replace_entry(store, 3, delta=named, target=target)
        found = place.fails(3)
        assert found.startswith("BadVersion: version 3 cannot be made: a delta is on a base")


class Endless:
    """A source that never ends, or gives more than it is asked for."""

    def __init__(self, n_bytes: int, extra: int = 0) -> None:
        self.n_bytes = n_bytes
        self.extra = extra
        self.n_read = 0

    def read(self, offset: int, n_bytes: int) -> bytes:
        self.n_read += n_bytes + self.extra
        return bytes(n_bytes + self.extra)

    def close(self) -> None:
        pass


class EndlessStore(MemoryStore):
    """Objects of one name never end."""

    source: Any = None

    def open(self, name: str) -> Any:
        return self.source if self.source and name.startswith("deltas") else super().open(name)


class TestSizes:
    @pytest.mark.parametrize("extra", [0, 7])
    def test_an_object_that_does_not_end(self, tmp_path: Path, extra: int) -> None:
        """No more is read than the entry names; the memory does not depend on it."""
        store = EndlessStore()
        published(store, 3)
        place = Place("model", tmp_path, store)
        n_bytes = 200 * MIB
        replace_entry(store, 3, delta=Object(bytes(32), n_bytes))
        store.source = Endless(n_bytes, extra)
        tracemalloc.start()
        try:
            assert "is damaged" in place.fails()
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert store.source.n_read <= n_bytes + extra * 200
        assert peak < 80 * MIB
        store.source = Endless(1 << 60)  # another size than the entry names: nothing is read
        assert "is damaged" in place.fails()
        assert not store.source.n_read

    @pytest.mark.parametrize("name", [entry_name(3), HEAD, CHANNEL])
    def test_json_that_is_too_long(self, store: MemoryStore, tmp_path: Path, name: str) -> None:
        store.objects[name] = b" " * (2 * MIB)
        follower = sparsedelta.Follower(sparsedelta.Channel(store), tmp_path / "out")
        with pytest.raises(BadVersion, match="too long; the channel is damaged"):
            follower.sync()
        assert not (tmp_path / "out").exists()

    def test_json_that_is_too_deep(self, store: MemoryStore, place: Place) -> None:
        raw = store.objects[entry_name(3)]
        store.objects[entry_name(3)] = raw.replace(b'"info":{}', b'"info":{"a":' + b"[" * 90_000)
        assert "the channel is damaged" in place.fails(3)


class EveryVersion(MemoryStore):
    """A store that has an entry for every number."""

    n_reads = 0

    def read(self, name: str, max_bytes: int) -> bytes | None:
        self.n_reads += 1
        if name.startswith("versions/"):
            number = int(name[9:-5])
            last = sparsedelta.Channel(MemoryStore(self.objects)).entry(4)
            entry: Entry = dataclasses.replace(last, version=number, segment=1)
            return entry.raw
        return super().read(name, max_bytes)


def test_a_channel_that_never_ends(store: MemoryStore, place: Place) -> None:
    endless = EveryVersion(store.objects)
    channel = sparsedelta.Channel(endless)
    with pytest.raises(BadVersion, match="a version for every number"):
        channel.head()
    assert endless.n_reads < 100
    with pytest.raises(BadVersion, match="names another entry before it"):
        list(channel.back(channel.entry(9_999_999_999)))


class TestAHeadThatJumpsBack:
    @pytest.fixture
    def restored(self, store: MemoryStore, place: Place) -> MemoryStore:
        """Return the channel after it was restored from a copy of version 1."""
        for name in [*store.objects]:
            if name.startswith(("versions/", "deltas/")) and name != entry_name(1):
                del store.objects[name]
        store.objects[HEAD] = json.dumps({"version": 1}).encode()
        return store

    def test_what_is_held_stays(self, restored: MemoryStore, place: Place) -> None:
        found = place.fails()
        assert found.startswith("Behind: the head of channel 'memory' is version 1, and version 2")
        assert place.follower.sync(1).version == 1
        assert is_at(place.held, 1)

    def test_a_process_that_starts_again(self, restored: MemoryStore, tmp_path: Path) -> None:
        out = tmp_path / "out"
        if not out.exists():  # the place is a model
            return
        follower = sparsedelta.Follower(sparsedelta.Channel(restored), out)
        with pytest.raises(Behind, match="version 2 was held before"):
            follower.sync()
        assert is_at(out, 2)
        follower = sparsedelta.Follower(sparsedelta.Channel(restored), out, overwrite=True)
        assert follower.sync().version == 1

    def test_only_the_hint(self, store: MemoryStore, place: Place) -> None:
        """head.json is a hint: followers find the head without it."""
        for raw in (b'{"version":1}', b'{"version":0}', b'{"version":77}', b"[", b""):
            store.objects[HEAD] = raw
            assert sparsedelta.Channel(store).head() == sparsedelta.Channel(store).entry(4)
        assert place.follower.sync().version == 4
        assert is_at(place.held, 4)

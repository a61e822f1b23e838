"""Publishers, followers and pruners for the simulation: the real protocol, with a word in place of weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import pytest
from blake3 import blake3
from channel.simulation import Call, Killed, Party, SimStore, Simulation, State, Violation

from sparsedelta.channel import following, publishing, versions
from sparsedelta.channel.channel import Channel
from sparsedelta.channel.entry import AnchorBase, Entry, parse_entry
from sparsedelta.channel.following import Onto, Pursuit
from sparsedelta.channel.layout import entry_name
from sparsedelta.channel.publishing import AnchorRule, Run
from sparsedelta.errors import BaseMismatch, Behind, HeadMoved, LimitExceeded
from sparsedelta.stores.stream import Stream

EVERY_SECOND = AnchorRule(ratio=None, every=2)


def mark(weights: str) -> bytes:
    """Return the fingerprint of weights."""
    return blake3(weights.encode()).digest()


@dataclass(frozen=True)
class WordChange:
    """A delta or an anchor of a word."""

    base: str | None
    target: str

    def blocks(self) -> Iterator[bytes]:
        yield json.dumps([self.base, self.target]).encode()
        yield b" " * (0 if self.base else 100)  # an anchor is heavier

    def close(self) -> None:
        pass


class WordSource:
    """A word that is published (``channel.publishing.Source``)."""

    def __init__(self, word: str) -> None:
        self.word = self.published = word

    def is_at(self, target: bytes) -> bool:
        return mark(self.published) == target

    def capture(self) -> CapturedWord:
        return CapturedWord(self, self.word)

    def advance(self, change: Any) -> None:
        if change.base != self.published:
            raise Violation(f"the copy is {self.published}, and is moved by {change}")
        self.published = change.target


@dataclass(frozen=True)
class CapturedWord:
    """A word as it was (``channel.publishing.Weights``)."""

    source: WordSource
    word: str

    def change(self) -> tuple[WordChange, bytes]:
        return WordChange(self.source.published, self.word), mark(self.word)

    def anchor(self) -> tuple[WordChange, bytes, AnchorBase | None]:
        return WordChange(None, self.word), mark(self.word), None


class WordReplica:
    """A word on a disk that outlives the follower's process (``channel.following.Replica``)."""

    has_other_files = False

    def __init__(self, disk: dict[str, Any]) -> None:
        self.disk = disk

    def fingerprint(self) -> bytes | None:
        word = self.disk.get("word")
        return mark(word) if word is not None else None

    def is_present(self) -> bool:
        return True

    def hints(self) -> Sequence[tuple[int, bytes]]:
        return [*self.disk.get("hints", ())]

    @property
    def last(self) -> int:
        return 0

    def has_base(self, base: AnchorBase) -> bool:
        return False

    def move(
        self,
        files: Sequence[IO[bytes]],
        onto: Onto,
        base: AnchorBase | None,
        held: Entry | None,
        to: Entry,
        becomes: Callable[[Entry | None], None],
    ) -> None:
        word = self.disk.get("word") if onto == "held" else None
        for file in files:
            before, after = json.loads(file.read())
            if before != word:
                raise BaseMismatch(f"the word is {word}, the delta is on {before}")
            word = after
        self.disk["hints"] = [(e.version, e.digest) for e in (to, held) if e]
        self.disk["word"] = word


def prefilled(*words: str, rule: AnchorRule | None = None) -> dict[str, bytes]:
    """Return the objects of a channel in which words were published."""
    objects: dict[str, bytes] = {}
    channel = Channel(MemoryStore(objects))
    channel._clock = lambda: 1_000_000
    source = WordSource("w0")
    run = Run(channel, source, rule or EVERY_SECOND, channel.head())
    run.id = "before"
    for word in words:
        source.word = word
        run.publish(step=None, info={})
    return objects


def disk_with(objects: dict[str, bytes], version: int, word: str) -> dict[str, Any]:
    """Return the disk of a follower that holds a version."""
    entry = Channel(MemoryStore(objects)).entry(version)
    return {"word": word, "hints": ((version, entry.digest),)}


def channel_of(store: SimStore) -> Channel:
    channel = Channel(store)
    channel._clock = lambda: store.call(Call("clock"))
    channel.pause = lambda seconds: None
    return channel


def publisher(
    name: str,
    words: Sequence[str],
    *,
    start: str = "w0",
    rule: AnchorRule | None = None,
    n_lives: int = 2,
    n_tries: int = 3,
) -> Party:
    """Return a publisher of words in turn; killed, it begins again with the word after the last published."""

    def party(store: SimStore) -> object:
        done: list[str] = []
        for life in range(n_lives):
            store.revive()
            try:
                return _publish(store, f"{name}{life}", words, start, done, rule, n_tries)
            except Killed:
                continue
        return "killed"

    return party


def _publish(
    store: SimStore,
    run_id: str,
    words: Sequence[str],
    start: str,
    done: list[str],
    rule: AnchorRule | None,
    n_tries: int,
) -> object:
    source = WordSource(done[-1] if done else start)
    channel = channel_of(store)
    run = _tried(n_tries, lambda: Run(channel, source, rule or EVERY_SECOND, channel.head()))
    if run is None:
        return "gave up"
    run.id = run_id
    for word in words[len(done) :]:
        source.word = word
        try:
            entry = _tried(n_tries, lambda: run.publish(step=None, info={}))
        except HeadMoved:
            return "head moved"
        if entry is None:
            return "gave up"
        if entry.target != mark(word) or source.published != word:
            raise Violation(f"{word} was published as another")
        store.call(Call("claim", entry_name(entry.version), entry.raw))
        done.append(word)
    return "published"


def follower(name: str, *, n_syncs: int = 2, n_lives: int = 2, disk: Any = None) -> Party:
    """Return a follower that moves to the head a few times; killed, it begins again with what is on its disk."""

    def party(store: SimStore) -> object:
        held: dict[str, Any] = dict(disk or {})
        left = [n_syncs]
        for life in range(n_lives):
            store.revive()
            try:
                _follow(store, f"{name}{life}", held, left)
                break
            except Killed:
                continue
        return frozenset({"word": held.get("word"), "hints": tuple(held.get("hints", ()))}.items())

    return party


def _follow(store: SimStore, holder: str, disk: dict[str, Any], left: list[int]) -> None:
    pursuit = Pursuit(channel_of(store), WordReplica(disk))
    pursuit.id = holder
    last = 0
    while left[0]:
        left[0] -= 1
        try:
            report = pursuit.sync(None)
        except (OSError, Behind):
            continue
        held = pursuit.held
        if held is None or held.version != report.version or mark(disk["word"]) != held.target:
            raise Violation(f"reports version {report.version} and holds {disk['word']}")
        if report.version < last:
            raise Violation(f"went back from version {last} to {report.version}")
        last = report.version


def pruner(keep: int, *, n_lives: int = 2) -> Party:
    """Return a pruner; killed or refused, it begins again."""

    def party(store: SimStore) -> object:
        for _ in range(n_lives):
            store.revive()
            try:
                channel_of(store).prune(keep=keep)
                return "pruned"
            except (Killed, OSError):
                continue
        return "killed"

    return party


class CatchUp:
    """Checks at an end that a follower with any of the disks reaches the head, nothing more going wrong."""

    def __init__(self, simulation: Simulation) -> None:
        self._simulation = simulation
        self._seen: set[object] = set()

    def __call__(self, state: State) -> None:
        disks = [found for found in self._simulation.results(state) if isinstance(found, frozenset)]
        for disk in [*disks, frozenset[Any]()]:
            key = state.world.objects, disk
            if key not in self._seen:
                self._seen.add(key)
                catch_up(dict(state.world.objects), disk)


def catch_up(objects: dict[str, bytes], disk: Any) -> None:
    """Check that a follower with this disk reaches the head of what a store holds, with nothing going wrong."""
    store = MemoryStore(objects)
    held = dict(disk)
    channel = Channel(store)
    head = channel.head()
    if head is None:
        return
    report = Pursuit(channel, WordReplica(held)).sync(None)
    if report.version != head.version or mark(held["word"]) != head.target:
        raise Violation(f"does not reach version {head.version}: {report}")


@contextmanager
def quick() -> Iterator[None]:
    """Make entries be parsed once, and every lease that a follower has taken be noted by the simulation."""
    take = following.take_lease  # type: ignore[attr-defined]

    def noted(channel: Any, segment: int, holder: str) -> int | None:
        until = take(channel, segment, holder)
        if until is not None and isinstance(channel.store, SimStore):
            channel.store.call(Call("note", content=f"{holder} {segment} {until}".encode()))
        return until

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(following, "take_lease", noted)
        patch.setattr(versions, "parse_entry", lru_cache(None)(parse_entry))
        patch.setattr(publishing, "_TRIES", 1)  # a single failure leaves a version unfinished
        patch.setattr("secrets.token_hex", lambda n: "00")
        yield


def _tried(n_tries: int, call: Any) -> Any:
    for _ in range(n_tries):
        try:
            return call()
        except OSError:
            continue
    return None


class MemoryStore:
    """Objects in memory (``sparsedelta.stores.objects.ObjectStore``)."""

    name = "memory"
    writable = True
    has_create = True

    def __init__(self, objects: dict[str, bytes] | None = None) -> None:
        self.objects = {} if objects is None else objects

    def read(self, name: str, max_bytes: int) -> bytes | None:
        found = self.objects.get(name)
        if found is not None and len(found) > max_bytes:
            raise LimitExceeded(f"object {name} is too long")
        return found

    def open(self, name: str) -> Stream | None:
        found = self.objects.get(name)
        return None if found is None else Stream(BytesIO(found))

    def create(self, name: str, content: Any) -> bool:
        if name in self.objects:
            return False
        self.write(name, content)
        return True

    def write(self, name: str, content: Any) -> None:
        self.objects[name] = content if isinstance(content, bytes) else Path(content).read_bytes()

    def delete(self, name: str) -> None:
        self.objects.pop(name, None)

    def list(self, prefix: str) -> list[str]:
        return sorted(name for name in self.objects if name.startswith(prefix))

    def close(self) -> None:
        pass

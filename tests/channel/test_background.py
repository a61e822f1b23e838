"""Versions are encoded and stored in the background, in order; errors come back to the caller."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from channel.parties import MemoryStore
from channel.test_channel import FailingStore, channel_on
from channel.weights import advance, is_at, weights

import sparsedelta


class SlowStore(MemoryStore):
    """Writes deltas and anchors only while a gate is open."""

    def __init__(self) -> None:
        super().__init__({})
        self.gate, self.waits = threading.Event(), threading.Event()

    def write(self, name: str, content: Any) -> None:
        self.waits.set()
        assert self.gate.wait(60)
        super().write(name, content)


@pytest.mark.parametrize("anchor_every", [None, 1])
def test_the_model_changes_while_a_version_is_stored(anchor_every: int | None) -> None:
    store, state = SlowStore(), weights(1)
    store.gate.set()
    channel = channel_on(store)
    with sparsedelta.Publisher(
        channel, state, anchor_ratio=None, anchor_every=anchor_every
    ) as publisher:
        publisher.publish(1).result()
        store.gate.clear()
        store.waits.clear()
        advance(state, 2)
        second = publisher.publish(2)
        assert store.waits.wait(60)
        advance(state, 3)
        assert not second.done()
        assert repr(second) == "<Publication on its way>"
        head = channel.head()
        assert head
        assert head.version == 1  # it cannot be seen yet
        store.gate.set()
        publisher.publish(3)
        assert second.done()  # one version after the other
        assert repr(second) == "<Publication of version 2>"
        assert repr(publisher) == f"<Publisher of run {publisher.run}>"
        assert "digest" not in repr(second.result())
    assert [entry.step for entry in channel.log()] == [3, 2, 1]  # close has waited
    held = weights(0)
    for version in (1, 2, 3):
        sparsedelta.Follower(channel, held).sync(version)
        assert is_at(held, version)


def test_an_error_is_raised_by_the_next_call_once() -> None:
    store = FailingStore()
    channel, state = channel_on(store), weights(1)
    publisher = sparsedelta.Publisher(channel, state)
    publisher.publish(1).result()
    advance(state, 2)
    store.fails = lambda call, name: "before" if name.startswith("deltas/") else None
    publisher.publish(2)
    advance(state, 3)
    with pytest.raises(OSError, match="the store failed"):
        publisher.publish(3)
    store.fails = lambda call, name: None
    publisher.publish(3)
    publisher.close()
    assert [entry.step for entry in channel.log()] == [
        3,
        1,
    ]  # version 2 has the changes of both steps
    held = weights(0)
    sparsedelta.Follower(channel, held).sync()
    assert is_at(held, 3)


def test_a_version_whose_answer_was_lost_is_finished_before_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = FailingStore()
    channel, state = channel_on(store), weights(1)
    publisher = sparsedelta.Publisher(channel, state, anchor_ratio=None)
    publisher.publish(1).result()
    read = store.read
    store.fails = lambda call, name: "after" if call == "create" else None
    monkeypatch.setattr(
        store, "read", lambda name, n: ("0002" not in name and read(name, n)) or None
    )
    advance(state, 2)
    with pytest.raises(OSError, match="answer was lost"):
        publisher.publish(2).result()
    monkeypatch.undo()
    store.fails = lambda call, name: None
    advance(state, 3)
    publisher.publish(3).result()
    assert [entry.step for entry in channel.log()] == [3, 2, 1]
    held = weights(0)
    for version in (1, 2, 3):
        sparsedelta.Follower(channel, held).sync(version)
        assert is_at(held, version)


def test_close_raises_what_has_failed_and_ends_the_publisher() -> None:
    store = FailingStore()
    publisher = sparsedelta.Publisher(channel_on(store), weights(1))
    store.fails = lambda call, name: "before" if call == "write" else None
    publisher.publish(1)
    with pytest.raises(OSError, match="the store failed"):
        publisher.close()
    publisher.close()
    with pytest.raises(ValueError, match="closed"):
        publisher.publish(1)

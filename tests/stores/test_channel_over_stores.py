"""A channel over every kind of store: published, followed by a model and a folder, pruned and joined late."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from channel.weights import advance, is_at, weights
from stores.conftest import Pair

import sparsedelta
from sparsedelta.stores.objects import ObjectStore

# The client of the Hub uses a deprecated function of its HTTP library.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


def test_published_followed_and_pruned(pair: Pair, tmp_path: Path) -> None:
    state, held, out = weights(1), weights(0), tmp_path / "out.safetensors"
    channel = sparsedelta.Channel(pair.writer)
    reader = sparsedelta.Channel(pair.reader)
    follower, on_disk = sparsedelta.Follower(reader, held), sparsedelta.Follower(reader, out)
    with sparsedelta.Publisher(channel, state, anchor_ratio=None, anchor_every=2) as publisher:
        for step in (1, 2, 3):
            if step > 1:
                advance(state, step)
            publisher.publish(step).result()
            assert follower.sync().version == step
            assert is_at(held, step)
            assert on_disk.sync().version == step
            assert is_at(out, step)
    restarted = sparsedelta.Publisher(channel, state)
    assert restarted.is_at_head
    assert [entry.step for entry in reader.log()] == [3, 2, 1]
    late = weights(0)
    assert sparsedelta.Follower(reader, late).sync(2).version == 2
    assert is_at(late, 2)
    # A reader that can write has leased the first segment, and keeps it.
    assert channel.prune(keep=1).leased == (1 if pair.reader.writable else None)
    assert sparsedelta.Follower(reader, weights(0)).sync().version == 3


def test_of_two_publishers_in_one_store_one_stops(store: ObjectStore) -> None:
    channel = sparsedelta.Channel(store)
    states = [weights(1), weights(1)]
    with sparsedelta.Publisher(channel, states[0]) as publisher:
        publisher.publish(1)
    both = [sparsedelta.Publisher(channel, state) for state in states]
    for step, state in enumerate(states, 2):
        advance(state, step)
    at_once = [publisher.publish(step) for step, publisher in enumerate(both, 2)]
    failed = []
    for publication in at_once:
        try:
            publication.result()
        except sparsedelta.SparseDeltaError as error:
            failed.append(error.code)
    assert failed == ["head_moved"]
    head = channel.head()
    assert head
    held = weights(0)
    assert sparsedelta.Follower(channel, held).sync().version == 2
    assert is_at(held, 2) if head.step == 2 else not is_at(held, 2)


def move(follower: sparsedelta.Follower, errors: list[BaseException]) -> None:
    """Sync in a thread."""
    try:
        follower.sync()
    except BaseException as error:
        errors.append(error)


def test_two_followers_of_one_folder(tmp_path: Path) -> None:
    channel, state, out = sparsedelta.Channel(tmp_path / "channel"), weights(1), tmp_path / "out"
    with sparsedelta.Publisher(channel, state) as publisher:
        publisher.publish(1).result()
        followers = [sparsedelta.Follower(channel, out) for _ in range(2)]
        followers[0].sync()
        for step in (2, 3, 4):
            advance(state, step)
            publisher.publish(step).result()
            errors: list[BaseException] = []
            threads = [threading.Thread(target=move, args=(one, errors)) for one in followers]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            # One may find that the other was quicker; the folder is a version all the time.
            assert all(isinstance(error, sparsedelta.SparseDeltaError) for error in errors), errors
            for follower in followers:
                assert follower.sync().version == step
            assert is_at(out, step)

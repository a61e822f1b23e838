"""One writer at a time, in stores whose ``create`` is not safe among several (spec/CHANNEL.md §2)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sparsedelta.channel.layout import LOCK
from sparsedelta.channel.versions import Versions
from sparsedelta.errors import HeadMoved
from sparsedelta.format.strict_json import compact_json


@contextmanager
def writing(channel: Versions, holder: str) -> Iterator[None]:
    """Be the only writer of a channel, where the store does not see to it.

    Raises:
        PermissionError: the store cannot be written.
        HeadMoved: another writer holds the lock, or has ended without removing it.
    """
    store = channel.store
    if not store.writable:
        raise PermissionError(
            f"channel '{store.name}' can only be read; give a store that can be written"
        )
    if store.has_create:
        yield
        return
    if not store.create(LOCK, compact_json({"holder": holder, "time": channel.now})):
        raise HeadMoved(
            f"channel '{store.name}' is being written by another; if that process has ended, delete"
            f" {LOCK} there"
        )
    try:
        yield
    finally:
        store.delete(LOCK)

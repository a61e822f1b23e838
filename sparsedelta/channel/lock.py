"""One writer at a time, in stores whose ``create`` is not safe among several (spec/CHANNEL.md §2)."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager

from sparsedelta.channel.layout import LOCK, MAX_JSON_BYTES
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
            f"channel '{store.name}' cannot be written: this user may not, its store can only be read, or the folder that it would be in does not"
            " exist; give a store that can be written"
        )
    if store.has_create:
        yield
        return
    token = secrets.token_hex(8)
    content = compact_json({"holder": holder, "time": channel.now, "token": token})
    # A create whose first answer was lost says that the object is there: it may be this one.
    if not store.create(LOCK, content) and store.read(LOCK, MAX_JSON_BYTES) != content:
        raise HeadMoved(
            f"channel '{store.name}' is being written by another; if that process has ended, delete"
            f" {LOCK} there"
        )
    try:
        yield
    finally:
        store.delete(LOCK)

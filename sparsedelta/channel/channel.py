"""``Channel``: a stream of versions of one checkpoint."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path

from sparsedelta._typing import AnyPath
from sparsedelta.channel.entry import Entry
from sparsedelta.channel.leases import is_closed
from sparsedelta.channel.pruning import PruneReport, prune
from sparsedelta.channel.versions import Versions
from sparsedelta.fs import overlap
from sparsedelta.stores.objects import ObjectStore


class Channel(Versions):
    """A stream of versions of one checkpoint, in a store.

    Safe for use from several threads. It can be used as a context, which closes it.

    Attributes:
        store: where it is.
    """

    def __init__(self, store: str | os.PathLike[str] | ObjectStore) -> None:
        """Open a channel, or what will be one when a version is published.

        Args:
            store: the path of a folder or the URL of a store, which is closed with the channel; or an open store,
                which is not.
        """
        self._is_own = isinstance(store, str | os.PathLike)
        super().__init__(_opened(store) if isinstance(store, str | os.PathLike) else store)

    def __repr__(self) -> str:
        return f"<Channel {self.store.name}>"

    def __enter__(self) -> Channel:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the store, if this channel has opened it."""
        if self._is_own:
            self.store.close()

    def log(self, *, limit: int | None = None) -> list[Entry]:
        """Return the entries of the latest versions, the latest first; all if there is no limit.

        Raises:
            BadVersion: see ``back``.
            FileExistsError: the store holds something else than a channel.
        """
        head = self.head()
        if head is None:
            self.check_place()
        found: list[Entry] = []
        for entry in self.back(head) if head and limit != 0 else ():
            found.append(entry)
            if len(found) == limit:
                break
        return found

    def is_pruned(self, entry: Entry) -> bool:
        """Return whether a version was pruned; its entry stays, and nobody can read it."""
        return is_closed(self, entry.segment)

    def prune(self, *, keep: int) -> PruneReport:
        """Delete what followers do not need to reach the latest ``keep`` versions, and garbage.

        Segments that a follower leases stay, and those after them. Entries stay for ever.

        Raises:
            ValueError: ``keep`` is no integer above 0.
            FileExistsError: the store holds something else than a channel.
            PermissionError: the store cannot be written.
        """
        return prune(self, keep=keep)


def open_channel(channel: Versions | AnyPath, context: ExitStack) -> Versions:
    """Return a channel; one that is given by its path or URL is closed with the context.

    Raises:
        TypeError: neither a channel nor a path or URL is given.
    """
    if isinstance(channel, str | os.PathLike):
        return context.enter_context(Channel(channel))
    if not isinstance(channel, Versions):
        raise TypeError(
            f"channel is of type {type(channel).__name__}, expected a Channel, or the path or URL of one"
        )
    return channel


def check_outside(channel: Versions, path: AnyPath, what: str) -> None:
    """Raise ValueError if a folder or file is, contains or lies in the folder of a channel.

    Args:
        channel: the channel; nothing is checked if its store is no folder.
        path: the folder or file.
        what: it is, for the error.
    """
    from sparsedelta.stores.folder import FolderStore

    if not isinstance(channel.store, FolderStore):
        return
    own = Path(channel.store.name)
    if overlap(Path(os.path.realpath(path)), own):
        raise ValueError(
            f"{what} '{os.fspath(path)}' and channel '{own}': one contains the other; give a place outside the channel's folder"
        )


def _opened(store: str | os.PathLike[str]) -> ObjectStore:
    from sparsedelta.stores import open_store

    return open_store(store)

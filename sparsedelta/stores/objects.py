"""Named objects: what a store of a channel offers (spec/CHANNEL.md §2)."""

from __future__ import annotations

import os
from typing import Protocol, TypeAlias

from sparsedelta.stores.base import ByteSource

Content: TypeAlias = bytes | os.PathLike[str]  # the bytes, or a file that holds them


class ObjectStore(Protocol):
    """Objects by name, such as the files of a folder or of a prefix of a bucket. Safe for use from several threads.

    A name has components joined by ``/``. What is written is whole or not there at all, and every read that
    begins later sees it. A call that raises may have taken effect. Errors are ``OSError``, or ``RemoteError`` for
    a store that is reached through a network.
    """

    @property
    def name(self) -> str:
        """What messages call the store, without credentials."""

    @property
    def writable(self) -> bool:
        """Whether objects can be written, as far as that is known before one is."""

    @property
    def has_create(self) -> bool:
        """Whether of several that create one name at once, one succeeds; known, not assumed.

        To find out, objects may be created and removed, and a network may fail.
        """

    def read(self, name: str, max_bytes: int) -> bytes | None:
        """Return an object of at most ``max_bytes`` bytes; None if there is none of this name.

        Raises:
            LimitExceeded: it is larger.
        """

    def open(self, name: str) -> ByteSource | None:
        """Return an object that is read by ranges; None if there is none of this name."""

    def create(self, name: str, content: Content) -> bool:
        """Write an object if there is none of this name; return whether that was done.

        A network may lose the answer of a try that did it, and the client tries again: then this is False, and
        the object has this content.
        """

    def write(self, name: str, content: Content) -> None:
        """Write an object, in place of one of this name."""

    def delete(self, name: str) -> None:
        """Remove an object if it is there."""

    def list(self, prefix: str) -> list[str]:
        """Return the names of the objects that begin with ``prefix``, sorted; the answer may be old."""

    def close(self) -> None:
        """Release what is held open."""

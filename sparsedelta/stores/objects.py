"""``ObjectStore``: the interface to a store of named objects (spec/CHANNEL.md §2)."""

from __future__ import annotations

import os
from typing import Protocol, TypeAlias

from sparsedelta.stores.base import ByteSource

Content: TypeAlias = bytes | os.PathLike[str]  # the bytes, or a file that holds them


class ObjectStore(Protocol):
    """A store of named objects, such as the files of a folder or of a bucket. Several threads may use it at once.

    A name has components joined by ``/``. A reader sees an object either complete or not at all. A read that begins
    after a write has ended sees the written object. A call that raises an error may still have taken effect.
    Methods raise ``OSError``; for a store on a network, ``RemoteError``.
    """

    @property
    def name(self) -> str:
        """The name of the store in messages, without credentials."""

    @property
    def writable(self) -> bool:
        """Whether objects can be written, as far as this is known before the first write."""

    @property
    def has_create(self) -> bool:
        """Whether exactly one writer succeeds if several create the same name at once.

        To test this, the store may create and remove objects. This may raise the errors of a network.
        """

    def read(self, name: str, max_bytes: int) -> bytes | None:
        """Return the content of an object, at most ``max_bytes`` bytes; None if it does not exist.

        Raises:
            LimitExceeded: the object is larger.
        """

    def open(self, name: str) -> ByteSource | None:
        """Return an object to read by range; None if it does not exist."""

    def create(self, name: str, content: Content) -> bool:
        """Write an object if none has this name; return whether it was written.

        If the network loses the answer to a successful request, the client sends it again. Then this returns
        False although the object has this content.
        """

    def write(self, name: str, content: Content) -> None:
        """Write an object. An object with this name is replaced."""

    def delete(self, name: str) -> None:
        """Remove an object if it exists."""

    def list(self, prefix: str) -> list[str]:
        """Return the names that begin with ``prefix``, sorted. The list may be out of date."""

    def close(self) -> None:
        """Release files and connections."""

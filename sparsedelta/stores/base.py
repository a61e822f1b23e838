"""``ByteSource``: the interface to read ranges of bytes of a file or object."""

from __future__ import annotations

from typing import Protocol


class ByteSource(Protocol):
    """A file or object whose bytes can be read by range. Several threads may read at once.

    Attributes:
        name: its name in messages.
        n_bytes: its size.
    """

    name: str
    n_bytes: int

    def read(self, offset: int, n_bytes: int) -> bytes:
        """Return up to ``n_bytes`` bytes from ``offset``; none at the end of the file."""

    def close(self) -> None:
        """Release files and memory."""

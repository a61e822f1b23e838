"""Bytes by range: what every store offers."""

from __future__ import annotations

from typing import Protocol


class ByteSource(Protocol):
    """Where the bytes of a ``.sd`` file come from. Safe for reading from several threads.

    Attributes:
        name: what messages call the file.
        n_bytes: its size.
    """

    name: str
    n_bytes: int

    def read(self, offset: int, n_bytes: int) -> bytes:
        """Return up to ``n_bytes`` bytes from ``offset``, none at the end."""

    def close(self) -> None:
        """Release what is held open."""

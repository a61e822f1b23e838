"""A remote object as a source of byte ranges. Only the ranges that are read are downloaded."""

from __future__ import annotations

import threading
from collections.abc import Callable

READ_AHEAD_BYTES = 128 << 10


class Ranges:
    """The bytes of a remote object or file; implements ``sparsedelta.stores.base.ByteSource``.

    A request downloads at least ``READ_AHEAD_BYTES``, so that a short header costs one request. Larger requests of
    several threads run at the same time.

    Args:
        name: its name in messages.
        n_bytes: its size.
        fetch: called with an offset and a number of bytes; returns these bytes.
        block: its first bytes, if they are known.
    """

    def __init__(
        self, name: str, n_bytes: int, fetch: Callable[[int, int], bytes], block: bytes = b""
    ) -> None:
        self.name = name
        self.n_bytes = n_bytes
        self._fetch = fetch
        self._block = block
        self._block_offset = 0
        self._lock = threading.Lock()

    def read(self, offset: int, n_bytes: int) -> bytes:
        """Return up to ``n_bytes`` bytes from ``offset``; none at the end of the file.

        Raises:
            RemoteError: the file is not available.
        """
        n_bytes = min(n_bytes, self.n_bytes - offset)
        if n_bytes <= 0:
            return b""
        if n_bytes >= READ_AHEAD_BYTES:
            return self._fetch(offset, n_bytes)
        with self._lock:
            begin = offset - self._block_offset
            if not 0 <= begin <= len(self._block) - n_bytes:
                wanted = min(READ_AHEAD_BYTES, self.n_bytes - offset)
                self._block = self._fetch(offset, wanted)
                self._block_offset, begin = offset, 0
            return self._block[begin : begin + n_bytes]

    def close(self) -> None:
        """Free the bytes that were read ahead."""
        self._block = b""

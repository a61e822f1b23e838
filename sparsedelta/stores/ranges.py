"""What is read through a network as bytes by range: so much of it is fetched as is read."""

from __future__ import annotations

import threading
from collections.abc import Callable

READ_AHEAD_BYTES = 128 << 10


class Ranges:
    """The bytes of an object or file elsewhere (``sparsedelta.stores.base.ByteSource``).

    A request fetches at least ``READ_AHEAD_BYTES``, so that a header and what follows it come at once. Larger
    requests of several threads run at the same time.

    Args:
        name: what messages call it.
        n_bytes: its size.
        fetch: gives the bytes from an offset, as many as the second argument says.
        block: its first bytes, where they are known.
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
        """Return up to ``n_bytes`` bytes from ``offset``, none at the end.

        Raises:
            RemoteError: they are not available.
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
        """Hold nothing any longer."""
        self._block = b""

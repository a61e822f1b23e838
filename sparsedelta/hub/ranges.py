"""A file of a repository as a source of byte ranges. Only the ranges that are read are downloaded."""

from __future__ import annotations

import threading

from sparsedelta.hub.client import Hub, RemoteFile
from sparsedelta.hub.references import Reference

READ_AHEAD_BYTES = 128 << 10


class RemoteBytes:
    """The bytes of a file on the Hub; implements ``sparsedelta.stores.base.ByteSource``.

    A request downloads at least ``READ_AHEAD_BYTES``, so that a short header costs one request.
    """

    def __init__(self, hub: Hub, pinned: Reference, file: RemoteFile) -> None:
        self.name = str(Reference(pinned.repo_id, pinned.revision, file.path))
        self.n_bytes = file.n_bytes
        self._hub = hub
        self._pinned = pinned
        self._path = file.path
        self._block = b""
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
        with self._lock:
            begin = offset - self._block_offset
            if not 0 <= begin <= len(self._block) - n_bytes:
                wanted = min(max(n_bytes, READ_AHEAD_BYTES), self.n_bytes - offset)
                self._block = self._hub.read(self._pinned, self._path, offset, wanted)
                self._block_offset, begin = offset, 0
            return self._block[begin : begin + n_bytes]

    def close(self) -> None:
        """Free the bytes that were read ahead."""
        self._block = b""

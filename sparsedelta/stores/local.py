"""Files on disk as bytes by range."""

from __future__ import annotations

import os

from sparsedelta.fs import open_regular


class OpenFile:
    """The bytes of a file on disk (``sparsedelta.stores.base.ByteSource``)."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.name = os.fsdecode(path)
        self._fd = open_regular(path)
        self.n_bytes = os.fstat(self._fd).st_size

    def read(self, offset: int, n_bytes: int) -> bytes:
        """Return up to ``n_bytes`` bytes from ``offset``, none at the end."""
        if self._fd < 0:
            raise ValueError(f"'{self.name}' is closed; load the delta again")
        return os.pread(self._fd, n_bytes, offset)

    def close(self) -> None:
        """Close the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __del__(self) -> None:
        if hasattr(self, "_fd"):
            self.close()

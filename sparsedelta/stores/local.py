"""A file on disk as a source of byte ranges."""

from __future__ import annotations

import os
import weakref

from sparsedelta.fs import open_regular
from sparsedelta.system import read_at


class OpenFile:
    """The bytes of a file on disk; implements ``sparsedelta.stores.base.ByteSource``."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.name = os.fsdecode(path)
        self._fd = open_regular(path)
        # The finalizer runs only once, also if the file is still open when the interpreter ends.
        self._closing = weakref.finalize(self, os.close, self._fd)
        self.n_bytes = os.fstat(self._fd).st_size

    def read(self, offset: int, n_bytes: int) -> bytes:
        """Return up to ``n_bytes`` bytes from ``offset``; none at the end of the file."""
        if not self._closing.alive:
            raise ValueError(f"'{self.name}' is closed; load the delta again")
        try:
            return read_at(self._fd, n_bytes, offset)
        except OSError as error:
            error.filename = self.name
            raise

    def close(self) -> None:
        """Close the file."""
        self._closing()

"""An open binary file, or a similar object, as a source of byte ranges."""

from __future__ import annotations

import os
import threading
from typing import Protocol


class Seekable(Protocol):
    """The methods that a binary file must have, such as one of fsspec or ``io.BytesIO``."""

    def read(self, size: int, /) -> bytes:
        """Return up to ``size`` bytes; none at the end of the file."""

    def seek(self, offset: int, whence: int = ..., /) -> int:
        """Move to a position; return its offset from the start of the file."""


class Stream:
    """The bytes of an open file; implements ``sparsedelta.stores.base.ByteSource``. The caller closes the file."""

    def __init__(self, file: Seekable) -> None:
        self.name = str(getattr(file, "name", f"<{type(file).__name__}>"))
        self._file = file
        self._lock = threading.Lock()
        self.n_bytes = file.seek(0, os.SEEK_END)

    def read(self, offset: int, n_bytes: int) -> bytes:
        """Return up to ``n_bytes`` bytes from ``offset``; none at the end of the file."""
        with self._lock:
            self._file.seek(offset)
            return self._file.read(n_bytes)

    def close(self) -> None:
        """Leave the file open."""

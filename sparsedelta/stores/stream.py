"""An open binary file, or anything like one, as bytes by range."""

from __future__ import annotations

import os
import threading
from typing import Protocol


class Seekable(Protocol):
    """What is needed of a binary file, such as one of fsspec or ``io.BytesIO``."""

    def read(self, size: int, /) -> bytes:
        """Return up to ``size`` bytes, none at the end."""

    def seek(self, offset: int, whence: int = ..., /) -> int:
        """Go to a place; return its offset from the start."""


class Stream:
    """The bytes of an open file (``sparsedelta.stores.base.ByteSource``), which stays the caller's to close."""

    def __init__(self, file: Seekable) -> None:
        self.name = str(getattr(file, "name", f"<{type(file).__name__}>"))
        self._file = file
        self._lock = threading.Lock()
        self.n_bytes = file.seek(0, os.SEEK_END)

    def read(self, offset: int, n_bytes: int) -> bytes:
        """Return up to ``n_bytes`` bytes from ``offset``, none at the end."""
        with self._lock:
            self._file.seek(offset)
            return self._file.read(n_bytes)

    def close(self) -> None:
        """Leave the file open."""

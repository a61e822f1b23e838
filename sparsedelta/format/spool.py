"""Where a new delta's coded bytes wait until it is saved: memory first, a temporary file when they grow."""

from __future__ import annotations

import tempfile
import threading
import weakref
from collections.abc import Iterable

from sparsedelta.fs import name_full_disk

_MEMORY_BYTES = 32 << 20


class SpoolPayload:
    """Coded entries written by several threads in any order (``sparsedelta.format.records.Payload``).

    Args:
        folder: where the temporary file goes; None: the system's place for such files.
    """

    def __init__(self, folder: str | None = None) -> None:
        self._file = tempfile.SpooledTemporaryFile(  # noqa: SIM115 - closed by close()
            max_size=_MEMORY_BYTES, dir=folder
        )
        self._closing = weakref.finalize(self, self._file.close)  # also when the interpreter ends
        self._folder = folder or tempfile.gettempdir()
        self._lock = threading.Lock()
        self._end = 0
        self._pieces: dict[str, list[tuple[int, int]]] = {}

    def append(self, key: str, frames: Iterable[bytes]) -> None:
        """Add bytes at the end of the entry ``key``."""
        with self._lock:
            start = self._end
            self._file.seek(start)
            try:
                for frame in frames:
                    self._file.write(frame)
                    self._end += len(frame)
            except OSError as error:
                name_full_disk(error, self._folder)
                raise
            self._pieces.setdefault(key, []).append((start, self._end - start))

    def n_bytes(self, key: str) -> int:
        """Return the size of an entry, 0 if there is none."""
        return sum(size for _, size in self._pieces.get(key, ()))

    def read(self, key: str, offset: int, n_bytes: int) -> bytes:
        """Return ``n_bytes`` bytes of an entry from ``offset``."""
        parts = []
        with self._lock:
            for start, size in self._pieces.get(key, ()):
                take = min(size - offset, n_bytes)
                if take > 0:
                    self._file.seek(start + offset)
                    parts.append(self._file.read(take))
                    n_bytes -= take
                offset = max(0, offset - size)
        return b"".join(parts)

    def check(self) -> None:
        """Check that the entries are still there; what this process wrote itself needs no digest.

        Raises:
            ValueError: the payload is closed.
        """
        if self._file.closed:
            raise ValueError("the delta is closed; make it again")

    def close(self) -> None:
        """Discard the entries."""
        self._closing()

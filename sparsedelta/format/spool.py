"""The payload of a new delta until it is saved: in memory first, then in a temporary file."""

from __future__ import annotations

import tempfile
import threading
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from sparsedelta.codecs.chunk import Chunk
from sparsedelta.codecs.zstd import compress_text
from sparsedelta.format.records import Stored
from sparsedelta.fs import name_full_disk

_MEMORY_BYTES = 32 << 20


@contextmanager
def new_payload(folder: str | None) -> Iterator[SpoolPayload]:
    """Yield a ``SpoolPayload`` for a new delta; it is closed if the ``with`` block raises an exception."""
    payload = SpoolPayload(folder)
    try:
        yield payload
    except BaseException:
        payload.close()
        raise


class SpoolPayload:
    """A payload to which several threads can add coded bytes (``sparsedelta.format.records.Payload``).

    Args:
        folder: folder for the temporary file; None for the system's temporary folder.
    """

    def __init__(self, folder: str | None = None) -> None:
        self._file = tempfile.SpooledTemporaryFile(  # noqa: SIM115 - closed by close()
            max_size=_MEMORY_BYTES, dir=folder
        )
        self._closing = weakref.finalize(self, self._file.close)  # also when the interpreter ends
        self._folder = folder or tempfile.gettempdir()
        self._lock = threading.Lock()
        self._end = 0

    def add_chunk(self, chunk: Chunk, streams: Iterable[bytes]) -> Chunk:
        """Store the streams of a chunk; return its record with their offset."""
        return chunk.at(self._append(streams))

    def add_streams(self, coded: bytes) -> int:
        """Store the streams of several chunks, end to end; return the offset of the first."""
        return self._append([coded])

    def add_text(self, raw: bytes) -> Stored:
        """Store a header or side file, compressed if that makes it smaller; return its record."""
        stored = compress_text(raw)
        return Stored(len(raw), len(stored), self._append([stored]))

    def add_stored(self, stored: Stored, coded: bytes) -> Stored:
        """Store a header or side file that another delta has coded; return its record here."""
        return replace(stored, offset=self._append([coded]))

    def read(self, offset: int, n_bytes: int) -> bytes:
        """Return ``n_bytes`` bytes from ``offset``.

        Raises:
            ValueError: the payload is closed.
        """
        with self._lock:
            if self._file.closed:
                raise ValueError("the delta is closed; create it again")
            self._file.seek(offset)
            return self._file.read(n_bytes)

    def taken(self) -> bytes:
        """Return all bytes, and discard them here."""
        try:
            return self.read(0, self._end)
        finally:
            self.close()

    def close(self) -> None:
        """Discard the bytes."""
        self._closing()

    def _append(self, parts: Iterable[bytes]) -> int:
        with self._lock:
            start = self._end
            self._file.seek(start)
            try:
                for part in parts:
                    self._file.write(part)
                    self._end += len(part)
            except OSError as error:
                name_full_disk(error, self._folder)
                raise
            return start

"""Where the coded bytes of a new delta are kept until it is saved: memory first, then a temporary file."""

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
    """Yield a payload for a new delta, which is closed if that comes to nothing; see ``SpoolPayload``."""
    payload = SpoolPayload(folder)
    try:
        yield payload
    except BaseException:
        payload.close()
        raise


class SpoolPayload:
    """Coded bytes written by several threads in any order (``sparsedelta.format.records.Payload``).

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

    def add_chunk(self, chunk: Chunk, streams: Iterable[bytes]) -> Chunk:
        """Store the streams of a chunk; return its record with their offset."""
        return replace(chunk, offset=self._append(streams))

    def add_text(self, raw: bytes) -> Stored:
        """Store a header or a side file, compressed where that pays; return where it lies."""
        stored = compress_text(raw)
        return Stored(len(raw), len(stored), self._append([stored]))

    def add_stored(self, stored: Stored, coded: bytes) -> Stored:
        """Store the bytes of a header or side file as another delta has them."""
        return replace(stored, offset=self._append([coded]))

    def read(self, offset: int, n_bytes: int) -> bytes:
        """Return ``n_bytes`` bytes from ``offset``.

        Raises:
            ValueError: the payload is closed.
        """
        with self._lock:
            if self._file.closed:
                raise ValueError("the delta is closed; make it again")
            self._file.seek(offset)
            return self._file.read(n_bytes)

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

"""A lock that many readers share and one writer has alone; a waiting writer goes before new readers."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class SharedLock:
    """Readers together, or one writer. Neither may be entered again by the thread that holds it."""

    def __init__(self) -> None:
        # Entered by itself, not by the condition: an interrupt cannot come between that and its release.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        # Whoever is interrupted on the way in or out can be taken out, wherever that was.
        self._readers: set[object] = set()
        self._waiting: set[object] = set()
        self._writer: object = None

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Hold the lock together with other readers."""
        me = object()
        try:
            with self._lock:
                self._changed.wait_for(lambda: self._writer is None and not self._waiting)
                self._readers.add(me)
            yield
        finally:
            try:
                self._leave(me)
            except BaseException:
                self._leave(me)
                raise

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the lock alone."""
        me = object()
        try:
            with self._lock:
                self._waiting.add(me)
                self._changed.wait_for(lambda: self._writer is None and not self._readers)
                self._writer = me
                self._waiting.discard(me)
                self._changed.notify_all()
            yield
        finally:
            try:
                self._leave(me)
            except BaseException:
                self._leave(me)
                raise

    def _leave(self, who: object) -> None:
        with self._lock:
            self._readers.discard(who)
            self._waiting.discard(who)
            if self._writer is who:
                self._writer = None
            self._changed.notify_all()

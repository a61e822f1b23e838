"""A lock that is held by several readers or by one writer. A waiting writer comes before new readers."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any


class SharedLock:
    """A lock for several readers or one writer. A thread that holds the lock must not enter it again."""

    def __init__(self) -> None:
        # Used with ``with`` directly, not through the condition: so an interrupt cannot leave it locked.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        # Sets of holders, not counts: a holder can be removed wherever it was interrupted.
        self._readers: set[object] = set()
        self._waiting: set[object] = set()
        self._writer: object = None

    def reading(self, then: Callable[[], Any] = lambda: None) -> Hold:
        """Return a context that holds the lock together with other readers.

        Args:
            then: called when the lock is held. ``with`` returns its result.
        """
        return Hold(self._enter_reading, self._leave, then)

    def writing(self, then: Callable[[], Any] = lambda: None) -> Hold:
        """Return a context that holds the lock alone; for ``then`` see ``reading``."""
        return Hold(self._enter_writing, self._leave, then)

    def _enter_reading(self, me: object) -> None:
        with self._lock:
            self._changed.wait_for(lambda: self._writer is None and not self._waiting)
            self._readers.add(me)

    def _enter_writing(self, me: object) -> None:
        with self._lock:
            self._waiting.add(me)
            self._changed.wait_for(lambda: self._writer is None and not self._readers)
            self._writer = me
            self._waiting.discard(me)
            self._changed.notify_all()

    def _leave(self, me: object) -> None:
        with self._lock:
            self._readers.discard(me)
            self._waiting.discard(me)
            if self._writer is me:
                self._writer = None
            self._changed.notify_all()


class Hold:
    """A context that holds a ``SharedLock``. The lock is also released when the context is garbage-collected.

    An interrupt may come after the body of ``with`` and before the first line of ``__exit__``. Then the context is
    garbage-collected when the traceback is freed, and the lock is released. ``contextlib.contextmanager`` would have
    more places where an interrupt leaves the lock held.
    """

    def __init__(
        self,
        enter: Callable[[object], None],
        leave: Callable[[object], None],
        then: Callable[[], Any],
    ) -> None:
        self._enter = enter
        self._leave = leave
        self._then = then
        # The lock refers to this object and not to the context, so that the context can be garbage-collected.
        self._me = object()

    def __enter__(self) -> Any:
        try:
            self._enter(self._me)
            return self._then()
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *exc: object) -> None:
        try:
            self._leave(self._me)
        except BaseException:  # an interrupt; leaving twice is harmless
            self._leave(self._me)
            raise

    def __del__(self) -> None:
        self._leave(self._me)

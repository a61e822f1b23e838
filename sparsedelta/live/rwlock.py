"""A lock that many readers share and one writer has alone; a waiting writer goes before new readers."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any


class SharedLock:
    """Readers together, or one writer. A thread that holds the lock must not enter it again."""

    def __init__(self) -> None:
        # Entered directly, not through the condition: an interrupt cannot come between that and its release.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        # Each holder is listed, so that one that was interrupted at any point can be removed.
        self._readers: set[object] = set()
        self._waiting: set[object] = set()
        self._writer: object = None

    def reading(self, then: Callable[[], Any] = lambda: None) -> Hold:
        """Return a context that holds the lock together with other readers.

        Args:
            then: called once the lock is held; ``with`` gives what it returns.
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
    """Holds a ``SharedLock`` while the context lasts, or until it is collected.

    An interrupt may come between the body of ``with`` and the first line of ``__exit__``. Then nothing refers to
    the context once the traceback is gone, and the lock is released. A generator of ``contextmanager`` has more
    such gaps.
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
        self._me = object()  # the lock refers to this one, and not to the context

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
        except BaseException:  # an interrupt: leaving twice does no harm
            self._leave(self._me)
            raise

    def __del__(self) -> None:
        self._leave(self._me)

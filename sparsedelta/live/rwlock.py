"""A lock that is held by several readers or by one writer; both get their turn."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any


class SharedLock:
    """A lock for several readers or one writer.

    Writers come in the order in which they asked, and the readers that wait when a writer leaves come before the next one:
    neither can keep the other out for ever. A thread that holds the lock may begin to read, too. To write it would wait for itself, which
    is refused.
    """

    def __init__(self) -> None:
        # Used with ``with`` directly, not through the condition: so an interrupt cannot leave it locked.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        # Holders, not counts: a holder can be removed wherever it was interrupted. With their threads:
        self._readers: dict[object, int] = {}
        self._writer: dict[object, int] = {}  # one at most
        self._next_writers: dict[object, int] = {}
        self._next_readers: dict[
            object, int
        ] = {}  # with the number of writers that had left when they asked
        self._n_written = 0

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
            thread = threading.get_ident()
            if thread not in (self._readers | self._writer).values():
                self._next_readers[me] = self._n_written
                self._changed.wait_for(
                    lambda: not self._writer and (not self._next_writers or self._is_due(me))
                )
                del self._next_readers[me]
            self._readers[me] = thread

    def _is_due(self, reader: object) -> bool:
        """Return whether a writer has left since a reader asked."""
        return self._next_readers[reader] < self._n_written

    def _enter_writing(self, me: object) -> None:
        with self._lock:
            thread = threading.get_ident()
            if thread in (self._readers | self._writer).values():
                raise RuntimeError(
                    "this thread reads or changes the model already, and would wait for itself for ever; end its block of"
                    " reading() or using() first"
                )
            self._next_writers[me] = thread
            self._changed.wait_for(
                lambda: (
                    not self._writer
                    and not self._readers
                    and next(iter(self._next_writers)) is me
                    and not any(map(self._is_due, self._next_readers))
                )
            )
            self._writer[me] = self._next_writers.pop(me)
            self._changed.notify_all()

    def _leave(self, me: object) -> None:
        with self._lock:
            for holders in (self._readers, self._next_readers, self._next_writers):
                holders.pop(me, None)
            if self._writer.pop(me, None) is not None:
                self._n_written += 1
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

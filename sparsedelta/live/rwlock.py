"""A lock that is held by several readers or by one writer; both get their turn."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

_log = logging.getLogger(__name__)
_PATIENCE_SECONDS = 60


class SharedLock:
    """A lock for several readers or one writer.

    Writers come in the order in which they asked, and the readers that wait when a writer leaves come before the next one:
    neither can keep the other out for ever. A thread that holds the lock must not ask for it again. It may be left in another thread, as
    the pools of servers do, so a thread that waits for itself cannot be told from one that waits for others: a warning is logged after
    a minute.
    """

    def __init__(self) -> None:
        # Used with ``with`` directly, not through the condition: so an interrupt cannot leave it locked.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        # Holders, not counts: a holder can be removed wherever it was interrupted.
        self._readers: set[object] = set()
        self._writer: object = None
        self._next_writers: dict[object, None] = {}  # in order
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
            self._next_readers[me] = self._n_written
            self._wait(
                lambda: self._writer is None and (not self._next_writers or self._is_due(me))
            )
            self._readers.add(me)
            del self._next_readers[me]

    def _is_due(self, reader: object) -> bool:
        """Return whether a writer has left since a reader asked."""
        return self._next_readers[reader] < self._n_written

    def _enter_writing(self, me: object) -> None:
        with self._lock:
            self._next_writers[me] = None
            self._wait(
                lambda: (
                    self._writer is None
                    and not self._readers
                    and next(iter(self._next_writers)) is me
                    and not any(map(self._is_due, self._next_readers))
                )
            )
            self._writer = me
            del self._next_writers[me]
            self._changed.notify_all()

    def _wait(self, may_enter: Callable[[], bool]) -> None:
        if not self._changed.wait_for(may_enter, _PATIENCE_SECONDS):
            _log.warning(
                "a thread has waited for %d seconds to read or change a model; one that is in reading() or using() must leave that block"
                " first, or it waits for itself for ever",
                _PATIENCE_SECONDS,
            )
            self._changed.wait_for(may_enter)

    def _leave(self, me: object) -> None:
        with self._lock:
            self._readers.discard(me)
            self._next_readers.pop(me, None)
            self._next_writers.pop(me, None)
            if self._writer is me:
                self._writer = None
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
        self._is_entered = False

    def __enter__(self) -> Any:
        if self._is_entered:
            raise RuntimeError("this context is in use; call reading() or using() for another one")
        self._is_entered = True
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
        finally:
            self._is_entered = False

    def __del__(self) -> None:
        self._leave(self._me)

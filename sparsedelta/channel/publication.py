"""``Publication``: a version that is being published in the background."""

from __future__ import annotations

import threading
from collections.abc import Callable

from sparsedelta.channel.entry import Entry


class Publication:
    """A version that is encoded and stored in the background.

    The thread is not a daemon: a process that ends waits for it.
    """

    def __init__(self, work: Callable[[], Entry]) -> None:
        """Start the work.

        Args:
            work: called once in another thread; returns the entry of the version.
        """
        self._work = work
        self._entry: Entry | None = None
        self._error: BaseException | None = None
        self._is_reported = False
        self._ended = (
            threading.Event()
        )  # after an interrupted Thread.join a thread seems to have ended
        threading.Thread(target=self._run, name="sparsedelta publisher").start()

    def __repr__(self) -> str:
        if not self.done():
            return "<Publication on its way>"
        entry = self._entry
        return f"<Publication of version {entry.version}>" if entry else "<Publication that failed>"

    def done(self) -> bool:
        """Return whether the version is durable, or has failed."""
        return self._ended.is_set()

    def result(self) -> Entry:
        """Wait until the version is durable; return its entry.

        Raises:
            HeadMoved, OSError, RemoteError, StructureMismatch: why it has failed; see ``Publisher.publish``.
        """
        self._ended.wait()
        if self._error:
            self._is_reported = True
            raise self._error
        if self._entry is None:
            raise AssertionError
        return self._entry

    def raise_unreported(self) -> None:
        """Wait, and raise the error if ``result`` has not raised it yet."""
        self._ended.wait()
        if self._error and not self._is_reported:
            self.result()

    def _run(self) -> None:
        try:
            self._entry = self._work()
        except BaseException as error:
            self._error = error
        finally:
            del self._work  # and what was captured
            self._ended.set()

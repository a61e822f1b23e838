"""Independent pieces of work on all cores; the first failure stops the others."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import TypeVar

from sparsedelta.interrupts import uninterrupted
from sparsedelta.progress import Progress, Silent

T = TypeVar("T")
R = TypeVar("R")


class Places:
    """Places that workers take turns in; ``with`` takes so many of them, all at once."""

    def __init__(self, n_taken: int, *, of: Places | None = None, n_places: int = 0) -> None:
        """Prepare.

        Args:
            n_taken: how many to take.
            of: take them of the same places as these.
            n_places: how many there are; not with ``of``.
        """
        self._n_taken = n_taken
        self._free: list[int] = of._free if of else [n_places]
        self._freed: threading.Condition = of._freed if of else threading.Condition()

    def __enter__(self) -> None:
        with self._freed:
            self._freed.wait_for(lambda: self._free[0] >= self._n_taken)
            self._free[0] -= self._n_taken

    def __exit__(self, *exc: object) -> None:
        with self._freed:
            self._free[0] += self._n_taken
            self._freed.notify_all()


# A chunk in which most elements change takes 200 MB while it is coded, one of 8-byte elements 400 MB;
# most take little. Workers that meet such a chunk take turns.
DENSE_ELEMENTS = 1 << 21
WIDE_BYTES = 8
dense_places = Places(1, n_places=2)
wide_places = Places(2, of=dense_places)


class Stopped(Exception):
    """Raised in a worker when another one has failed or the program was interrupted."""


class Pace:
    """Reports progress, and stops every worker that reports to it once one has failed."""

    def __init__(self, progress: Progress | None = None) -> None:
        """Prepare.

        Raises:
            TypeError: ``progress`` is no receiver of progress, such as ``True``.
        """
        self.progress = progress or Silent()
        if not isinstance(self.progress, Progress):
            raise TypeError(
                f"progress is {progress!r}, expected None or an object with the methods start(label, n_bytes),"
                " advance(n_bytes) and finish(); the command line shows a bar"
            )
        # A list, because setting an Event that is interrupted may leave its lock held.
        self._stops: list[bool] = []

    def unreported(self) -> Pace:
        """Return a pace for work that was not announced: it stops with this one and reports nothing."""
        pace = Pace()
        pace._stops = self._stops
        return pace

    def advance(self, n_bytes: int) -> None:
        """Report that ``n_bytes`` are done; raises Stopped if the work has to end."""
        self.check()
        self.progress.advance(n_bytes)

    def check(self) -> None:
        """Raise Stopped if the work has to end."""
        if self._stops:
            raise Stopped

    def stop(self) -> None:
        """Make every worker end at its next report."""
        self._stops.append(True)


def n_workers() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_all(
    work: Callable[[T], R],
    items: Sequence[T],
    *,
    cost: Callable[[T], int],
    pace: Pace,
    label: str = "",
    n_bytes: int | None = None,
) -> list[R]:
    """Return ``work`` of every item, in the items' order; the costliest are begun first.

    Raises whatever ``work`` raised first; all workers have ended by then.

    Args:
        work: done in threads.
        items: what it is done to.
        cost: what an item takes.
        pace: told of it by ``work``.
        label: what the stage is called.
        n_bytes: what ``pace`` is told of in all; None: the cost of all items.
    """
    costs = [cost(item) for item in items]
    order = iter(sorted(range(len(items)), key=lambda i: -costs[i]))  # shared by the workers
    results: dict[int, R] = {}
    failures: list[BaseException] = []
    threads: list[threading.Thread] = []
    ended: list[None] = []  # one for each worker, and then an entry of ``ends``
    ends: SimpleQueue[None] = SimpleQueue()

    def run() -> None:
        try:
            for i in order:
                pace.check()
                results[i] = work(items[i])
        except BaseException as error:
            failures.append(error)
            pace.stop()
        finally:
            ended.append(None)
            ends.put(None)

    def wait() -> None:
        # An interrupted Thread.join takes a running thread for one that has ended.
        while len(ended) < len(threads):
            ends.get()

    # Not a ThreadPoolExecutor: an interrupt inside its methods may leave a lock held, and all workers waiting.
    pace.progress.start(label, sum(costs) if n_bytes is None else n_bytes)
    try:
        with uninterrupted():
            for _ in range(min(n_workers(), len(items))):
                thread = threading.Thread(target=run)
                thread.start()
                threads.append(thread)
        wait()
        if failures:
            raise next((e for e in failures if not isinstance(e, Stopped)), failures[0])
        return [results[i] for i in range(len(items))]
    finally:
        pace.stop()
        with uninterrupted():
            wait()
            for thread in threads:
                thread.join()
        failures.clear()  # an error holds this frame, and this frame must not hold the error
        pace.progress.finish()

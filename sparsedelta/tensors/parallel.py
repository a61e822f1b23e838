"""Runs independent pieces of work in one thread per core. The first failure stops all of them."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import TypeVar

import numpy as np

from sparsedelta.interrupts import uninterrupted
from sparsedelta.progress import Progress, Silent

T = TypeVar("T")
R = TypeVar("R")


class Places:
    """A semaphore with permits. ``with`` takes several permits at once, so that two workers cannot deadlock."""

    def __init__(self, n_taken: int, *, of: Places | None = None, n_places: int = 0) -> None:
        """Create a semaphore, or share that of ``of``.

        Args:
            n_taken: number of permits that ``with`` takes.
            of: take the permits from the same semaphore as this one.
            n_places: number of permits of a new semaphore; not used with ``of``.
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


# Coding a chunk in which most elements change takes 200 MB, or 400 MB with 8-byte elements. Most chunks take
# little. Only two workers code such chunks at the same time, or one with 8-byte elements.
DENSE_ELEMENTS = 1 << 21
WIDE_BYTES = 8
_WAITING_WORKERS = 16  # file systems write what several threads sync at the same time in one step
_SMALL_BYTES = 1 << 18  # items that cost less go to one worker
_KEPT_BYTES = 1 << 22  # of freed memory, twice as much in each worker
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
        self.progress: Progress = Silent() if progress is None else progress
        if progress is not None and not isinstance(progress, Progress):
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


def _keep_freed_memory() -> None:
    """Make glibc keep memory that a worker frees, so that the next chunk does not wait for new pages.

    When a block of this size is freed, glibc raises two limits (mallopt(3), ``M_MMAP_THRESHOLD``): smaller blocks come from
    a heap, and a heap returns memory only beyond twice this size. The block is never written to, so it takes no memory.
    """
    np.empty(_KEPT_BYTES, np.uint8)


def run_all(
    work: Callable[[T], R],
    items: Sequence[T],
    *,
    cost: Callable[[T], int],
    pace: Pace,
    label: str = "",
    n_bytes: int | None = None,
    waits: bool = False,
) -> list[R]:
    """Return the result of ``work`` for each item, in the order of the items; the items of highest cost start first.

    One worker does all items of low cost. Most of their work needs the interpreter's lock, so that two workers
    would mostly wait for each other.

    If ``work`` raises an error, all workers end, and then the first error is raised.

    Args:
        work: called in several threads.
        items: the arguments of ``work``.
        cost: returns the cost of an item in bytes.
        pace: ``work`` reports its progress to it.
        label: name of the stage for the progress.
        n_bytes: number of bytes that ``work`` reports in all; None for the cost of all items.
        waits: ``work`` mostly waits, for example for the disk; more workers then do more at the same time.
    """
    _keep_freed_memory()
    costs = [cost(item) for item in items]
    order = sorted(range(len(items)), key=lambda i: -costs[i])
    small = [i for i in order if costs[i] < _SMALL_BYTES and not waits]
    batches = [small] * bool(small) + [[i] for i in order[: len(order) - len(small)]]
    left = iter(batches)  # shared by the workers
    results: dict[int, R] = {}
    failures: list[BaseException] = []
    threads: list[threading.Thread] = []
    ended: list[None] = []  # one entry per worker that has ended, before its entry in ``ends``
    ends: SimpleQueue[None] = SimpleQueue()

    def run() -> None:
        try:
            for batch in left:
                for i in batch:
                    pace.check()
                    results[i] = work(items[i])
        except BaseException as error:
            failures.append(error)
            pace.stop()
        finally:
            ended.append(None)
            ends.put(None)

    def wait() -> None:
        # Not Thread.join: after an interrupted join, Python believes that a running thread has ended.
        while len(ended) < len(threads):
            ends.get()

    # Not a ThreadPoolExecutor: an interrupt in its methods can leave a lock held, and workers wait for it for ever.
    pace.progress.start(label, sum(costs) if n_bytes is None else n_bytes)
    try:
        with uninterrupted():
            for _ in range(min(_WAITING_WORKERS if waits else n_workers(), len(batches))):
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
        failures.clear()  # avoids a reference cycle: an error refers to this frame
        pace.progress.finish()

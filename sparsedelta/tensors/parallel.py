"""Independent pieces of work on all cores; the first failure stops the others."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import TypeVar

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
_SMALL_BYTES = 1 << 18
dense_places = Places(1, n_places=2)
wide_places = Places(2, of=dense_places)


class Stopped(Exception):
    """Raised inside workers when another one has failed or the person has interrupted."""


class Pace:
    """Passes progress on, if anyone is to know, and stops the worker that reports it once the work has failed."""

    def __init__(self, progress: Progress | None = None) -> None:
        self.progress = progress or Silent()
        self._stop = threading.Event()

    def unreported(self) -> Pace:
        """Return a pace for work that was not announced: it stops with this one and reports nothing."""
        pace = Pace()
        pace._stop = self._stop
        return pace

    def advance(self, n_bytes: int) -> None:
        """Report ``n_bytes`` done; raises Stopped if the work is to end."""
        if self._stop.is_set():
            raise Stopped
        self.progress.advance(n_bytes)

    def stop(self) -> None:
        """Make every worker end at its next report."""
        self._stop.set()


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

    One worker does all that cost little, one after another: their work is the interpreter's, in which workers
    only stand in each other's way.

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
    order = sorted(range(len(items)), key=lambda i: -costs[i])
    small = [i for i in order if costs[i] < _SMALL_BYTES]
    batches = [small] * bool(small) + [[i] for i in order[: len(order) - len(small)]]

    def do(batch: list[int]) -> list[R]:
        return [work(items[i]) for i in batch]

    pace.progress.start(label, sum(costs) if n_bytes is None else n_bytes)
    with ThreadPoolExecutor(n_workers()) as pool:
        try:
            futures = [pool.submit(do, batch) for batch in batches]
            wait(futures, return_when=FIRST_EXCEPTION)
            failed = [f for f in futures if f.done() and f.exception()]
            for future in failed:
                if not isinstance(future.exception(), Stopped):
                    future.result()
            done = zip(batches, futures, strict=True)
            found = {i: r for batch, f in done for i, r in zip(batch, f.result(), strict=True)}
            return [found[i] for i in range(len(items))]
        finally:
            pace.stop()
            pool.shutdown(wait=True, cancel_futures=True)
            pace.progress.finish()

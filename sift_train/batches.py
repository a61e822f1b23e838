"""Groups the micro-batches of a run into windows, one per optimizer step.

A resumed run gets the same micro-batches as an uninterrupted one. For this, the pass starts again
with its saved random state, and the micro-batches that were already used are skipped. Those that were read
ahead are read again with the random state of that time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

from sift_train.randomness import State, capture_random_state, generators_of, restore_random_state


class BatchWindows:
    """Iterates over windows of micro-batches, pass after pass.

    Args:
        data: iterated over once per pass.
        window: micro-batches per optimizer step; the last window of a pass may have fewer.
    """

    def __init__(self, data: Iterable[Any], window: int) -> None:
        self._data = data
        self._window = window
        self._stream: Iterator[Any] | None = None
        self._peeked: deque[Any] = deque()
        # What peek has read in this pass: first micro-batch, the one after the last, random state before.
        self._read_ahead: list[tuple[int, int, State]] = []
        self._n_used = 0
        self._state_at_start: State = {}

    def peek(self, n: int) -> list[Any]:
        """Return the next n micro-batches of the pass, or those that are left; ``windows`` yields them again."""
        stream = self._stream or self._start_pass()
        if n > len(self._peeked):
            state = capture_random_state(generators_of(self._data))
            start = self._n_used + len(self._peeked)
            self._peeked.extend(islice(stream, n - len(self._peeked)))
            self._read_ahead.append((start, self._n_used + len(self._peeked), state))
        return list(islice(self._peeked, n))

    def windows(self) -> Iterator[list[Any]]:
        """Yield windows until a pass has no micro-batch, for example because the data is an iterator.

        Raises:
            ValueError: the first pass has no micro-batch.
        """
        is_first = True
        while True:
            stream = self._stream or self._start_pass()
            while window := self._take(stream):
                self._n_used += len(window)
                yield window
            if self._n_used == 0 and is_first:
                raise ValueError("the data has no batch; give at least one")
            if self._n_used == 0:
                return
            is_first, self._stream = False, None
            self._read_ahead.clear()

    def place(self) -> State:
        """Return the position in the data, for a checkpoint."""
        ahead = [list(each) for each in self._read_ahead if each[1] > self._n_used]
        return {"begun": self._state_at_start, "n_given": self._n_used, "ahead": ahead}

    def go_to(self, place: Mapping[str, Any]) -> None:
        """Move to a saved position, and set the random state that the pass has there."""
        restore_random_state(place["begun"], generators_of(self._data))
        stream = self._start_pass()
        n_used, at = int(place["n_given"]), 0
        for start, end, state in place["ahead"]:
            _skip(stream, start - at)
            restore_random_state(state, generators_of(self._data))
            read = list(islice(stream, end - start))
            self._peeked.extend(read[max(n_used - start, 0) :])
            self._read_ahead.append((start, end, state))
            at = end
        _skip(stream, n_used - at)
        self._n_used = n_used

    def _start_pass(self) -> Iterator[Any]:
        self._state_at_start = capture_random_state(generators_of(self._data))
        self._stream = iter(self._data)
        self._n_used = 0
        return self._stream

    def _take(self, stream: Iterator[Any]) -> list[Any]:
        window: list[Any] = []
        while self._peeked and len(window) < self._window:
            window.append(self._peeked.popleft())
        return window + list(islice(stream, self._window - len(window)))


def _skip(stream: Iterator[Any], n: int) -> None:
    for _ in islice(stream, max(n, 0)):
        pass

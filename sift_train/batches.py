"""Groups the micro-batches of a run into windows, one per optimizer step.

A resumed run gets the same micro-batches as an uninterrupted one. For this, the pass starts again
with its saved random state, and the micro-batches that were already used are skipped.
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
        self._n_peeked = 0  # micro-batches that peek read in this pass
        self._n_used = 0
        self._state_at_start: State = {}

    def peek(self, n: int) -> list[Any]:
        """Return the first n micro-batches of the first pass; ``windows`` yields them again."""
        stream = self._start_pass()
        self._peeked.extend(islice(stream, n))
        self._n_peeked = n
        return list(self._peeked)

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
            is_first, self._stream, self._n_peeked = False, None, 0

    def place(self) -> State:
        """Return the position in the data, for a checkpoint."""
        return {"begun": self._state_at_start, "n_given": self._n_used, "n_ahead": self._n_peeked}

    def go_to(self, place: Mapping[str, Any]) -> None:
        """Move to a saved position, and set the random state that the pass has there."""
        restore_random_state(place["begun"], generators_of(self._data))
        stream = self._start_pass()
        n_used, n_peeked = int(place["n_given"]), int(place["n_ahead"])
        for _ in islice(stream, n_used):
            pass
        self._peeked.extend(islice(stream, max(n_peeked - n_used, 0)))
        self._n_used, self._n_peeked = n_used, n_peeked

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

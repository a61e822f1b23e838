"""The micro-batches of a run, in the windows that optimizer steps take, with a place to return to.

A run that goes on from a saved place is fed what the uninterrupted one would have been: a pass is
begun again under the random state it began with, and what was given is skipped.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

from sift_train.randomness import State, bring_back, capture, generators_of


class Feed:
    """Gives windows of micro-batches, pass after pass.

    Args:
        data: iterated over once per pass.
        window: micro-batches per optimizer step; the last window of a pass may have fewer.
    """

    def __init__(self, data: Iterable[Any], window: int) -> None:
        self._data = data
        self._window = window
        self._stream: Iterator[Any] | None = None
        self._ahead: deque[Any] = deque()
        self._n_ahead = 0  # looked at before the pass's first window
        self._n_given = 0
        self._begun: State = {}

    def peek(self, n: int) -> list[Any]:
        """Return the first micro-batches of the first pass; they are given again later."""
        stream = self._begin()
        self._ahead.extend(islice(stream, n))
        self._n_ahead = n
        return list(self._ahead)

    def windows(self) -> Iterator[list[Any]]:
        """Yield windows, until a further pass gives nothing, as with an iterator that is used up.

        Raises:
            ValueError: the first pass has no micro-batch.
        """
        is_first = True
        while True:
            stream = self._stream or self._begin()
            while window := self._take(stream):
                self._n_given += len(window)
                yield window
            if self._n_given == 0 and is_first:
                raise ValueError("the data gave no batch; give at least one")
            if self._n_given == 0:
                return
            is_first, self._stream, self._n_ahead = False, None, 0

    def place(self) -> State:
        """Return where the run is in the data, to be saved."""
        return {"begun": self._begun, "n_given": self._n_given, "n_ahead": self._n_ahead}

    def go_to(self, place: Mapping[str, Any]) -> None:
        """Go where a saved run was. Random state is left as it is then in the middle of a pass."""
        bring_back(place["begun"], generators_of(self._data))
        stream = self._begin()
        n_given, n_ahead = int(place["n_given"]), int(place["n_ahead"])
        for _ in islice(stream, n_given):
            pass
        self._ahead.extend(islice(stream, max(n_ahead - n_given, 0)))
        self._n_given, self._n_ahead = n_given, n_ahead

    def _begin(self) -> Iterator[Any]:
        self._begun = capture(generators_of(self._data))
        self._stream = iter(self._data)
        self._n_given = 0
        return self._stream

    def _take(self, stream: Iterator[Any]) -> list[Any]:
        window: list[Any] = []
        while self._ahead and len(window) < self._window:
            window.append(self._ahead.popleft())
        return window + list(islice(stream, self._window - len(window)))

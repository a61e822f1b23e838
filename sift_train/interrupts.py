"""Ctrl-C as a request to stop after the current step, so that every step is done completely."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupts:
    """A signal handler: records the first Ctrl-C and raises ``KeyboardInterrupt`` at the second."""

    def __init__(self) -> None:
        self.requested = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Record a signal.

        Raises:
            KeyboardInterrupt: a signal was recorded before.
        """
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True


@contextmanager
def deferred_interrupts() -> Iterator[Interrupts]:
    """Record Ctrl-C inside the block; only in the main thread, since others get no signals."""
    interrupts = Interrupts()
    if threading.current_thread() is not threading.main_thread():
        yield interrupts
        return
    before = signal.signal(signal.SIGINT, interrupts)
    try:
        yield interrupts
    finally:
        signal.signal(signal.SIGINT, before)

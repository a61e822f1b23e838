"""Ctrl-C and SIGTERM as a request to stop after the current step, so that every step is done completely."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupts:
    """A signal handler: records the first signal, and raises ``KeyboardInterrupt`` at a later Ctrl-C."""

    def __init__(self) -> None:
        self.requested = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Record a signal.

        Raises:
            KeyboardInterrupt: a signal was recorded before. A second SIGTERM is ignored, because schedulers and
                launchers may both send one.
        """
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True


@contextmanager
def deferred_interrupts() -> Iterator[Interrupts]:
    """Record Ctrl-C and SIGTERM inside the block; only in the main thread, since others get no signals.

    A handler of SIGTERM that somebody else has installed stays.
    """
    interrupts = Interrupts()
    if threading.current_thread() is not threading.main_thread():
        yield interrupts
        return
    before = {signal.SIGINT: signal.signal(signal.SIGINT, interrupts)}
    try:
        if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            before[signal.SIGTERM] = signal.signal(signal.SIGTERM, interrupts)
        yield interrupts
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

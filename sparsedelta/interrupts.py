"""Delay Ctrl-C and other signals that end a program while a step must not be interrupted."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Delay the first signal of ``SIGNALS`` until the context ends. Later signals are handled immediately.

    Only signals with a handler in Python are delayed. Python runs handlers in the main thread only, so in
    another thread this does nothing. If the context ends with an exception, the delayed signal is dropped.
    """
    in_main = threading.current_thread() is threading.main_thread()
    handlers = {number: signal.getsignal(number) for number in SIGNALS if in_main}
    held: list[tuple[int, FrameType | None]] = []
    ended = False

    def hold(number: int, frame: FrameType | None) -> None:
        if not ended:
            held.append((number, frame))
        if ended or len(held) > 1:
            handle(number, frame)

    def handle(number: int, frame: FrameType | None) -> None:
        handler = handlers[signal.Signals(number)]
        if callable(handler):
            handler(number, frame)

    replaced = [number for number, handler in handlers.items() if callable(handler)]
    try:
        for number in replaced:
            signal.signal(number, hold)
        yield
    finally:
        ended = True  # a signal during the next lines may leave ``hold`` installed
        for number in replaced:
            signal.signal(number, handlers[number])
    if held:
        handle(*held[0])

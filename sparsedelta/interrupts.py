"""Delay Ctrl-C and other signals that end a program while a step must not be interrupted."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)


class Delay:
    """The handler of signals while they are delayed.

    Args:
        handlers: the handlers that it stands for, by signal.
    """

    def __init__(self, handlers: Mapping[int, Any]) -> None:
        self._handlers = handlers
        self._held: list[tuple[int, FrameType | None]] = []
        self.has_ended = False
        self.is_lifted = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Delay the first signal; handle later ones."""
        if self.has_ended or self.is_lifted or self._held:
            self._handle(number, frame)
        else:
            self._held.append((number, frame))

    def handle_now(self) -> None:
        """Handle the delayed signal, if there is one; this usually raises ``KeyboardInterrupt``."""
        if self._held:
            self._handle(*self._held.pop(0))

    @contextmanager
    def lifted(self) -> Iterator[None]:
        """Handle signals immediately until the context ends, the delayed one first. They can be delayed again inside it."""
        self.is_lifted = True
        try:
            self.handle_now()
            yield
        finally:
            self.is_lifted = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        handler = self._handlers[number]
        if callable(handler):
            handler(number, frame)


@contextmanager
def uninterrupted() -> Iterator[Delay]:
    """Delay the first signal of ``SIGNALS`` until the context ends. Later signals are handled immediately.

    Only signals with a handler in Python are delayed. Python runs handlers in the main thread only, so in
    another thread this does nothing, nor inside another such context. If the context ends with an exception, the
    delayed signal is dropped.
    """
    in_main = threading.current_thread() is threading.main_thread()
    handlers = {int(number): signal.getsignal(number) for number in SIGNALS if in_main}
    delay = Delay(handlers)
    replaced = [number for number, old in handlers.items() if callable(old) and not _delays(old)]
    try:
        for number in replaced:
            signal.signal(number, delay)
        yield delay
    finally:
        delay.has_ended = True  # a signal during the next lines may leave the delay installed
        for number in replaced:
            signal.signal(number, handlers[number])
    delay.handle_now()


def _delays(handler: Any) -> bool:
    return isinstance(handler, Delay) and not handler.has_ended and not handler.is_lifted

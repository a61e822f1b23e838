"""How failures are reported: one line on stderr, free of anything that a terminal would act on."""

from __future__ import annotations

import io
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import click

from sparsedelta.errors import SparseDeltaError
from sparsedelta.report.text import printable

_SIGNALS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]

_NO_READER = 141  # 128 + SIGPIPE

# ValueError: an argument that only the library can judge. Anything else is a bug: a traceback.
EXPECTED = (SparseDeltaError, ValueError, OSError, MemoryError)


def describe(error: BaseException) -> str:
    """Return what went wrong as one line."""
    if isinstance(error, OSError) and error.strerror:
        names = [name for name in (error.filename, error.filename2) if name is not None]
        return printable("".join(f"'{name}': " for name in names) + str(error.strerror).lower())
    if isinstance(error, MemoryError):
        return printable(f"out of memory: {error}") if str(error) else "out of memory"
    return printable(str(error)) or type(error).__name__


def report_failure(error: BaseException, *, with_traceback: bool) -> None:
    """Tell of a failure on stderr."""
    from sparsedelta.hub.secrets import credentials
    from sparsedelta.redaction import redacted

    known = credentials(error)
    if with_traceback:
        lines = "".join(traceback.format_exception(error))
        click.echo(redacted(lines, known), err=True, nl=False)
    click.echo(f"error: {redacted(describe(error), known)}", err=True)


def report_interrupt(number: int) -> None:
    """Tell on stderr of the signal that ended the work."""
    start = "\n" if sys.stderr.isatty() else ""  # the terminal has written "^C" on this line
    name = "interrupted" if number == signal.SIGINT else f"ended by {signal.Signals(number).name}"
    click.echo(start + name, err=True)


@contextmanager
def ending_signals() -> Iterator[None]:
    """Raise KeyboardInterrupt, with the number, at Ctrl-C, SIGTERM and SIGHUP, so that the work is cleared away.

    Only at the first: launchers send several, and clearing away goes on. Signals that this process
    ignores, as ``nohup`` makes it, stay ignored.
    """
    defaults = (signal.SIG_DFL, signal.default_int_handler)
    caught = {number: signal.getsignal(number) for number in _SIGNALS}
    caught = {number: handler for number, handler in caught.items() if handler in defaults}
    if threading.current_thread() is not threading.main_thread():
        caught = {}

    def end(number: int, frame: FrameType | None) -> None:
        for other in caught:
            signal.signal(other, signal.SIG_IGN)
        raise KeyboardInterrupt(number)

    try:
        for number in caught:
            signal.signal(number, end)
        yield
    finally:
        for number, handler in caught.items():
            signal.signal(number, handler)


class _Stream(io.FileIO):
    """Standard output or error. What cannot be written to stderr is lost, and nothing else with it."""

    _has_failed = False

    def write(self, data: Any, /) -> int:
        """Write bytes; after a failure, which is raised once and only of stdout, drop them.

        Raises:
            SystemExit: nobody reads stdout any longer, as ``| head`` makes it, or wants to know more.
            OSError: stdout cannot be written for another reason.
        """
        try:
            return super().write(data)
        except OSError as error:
            if self.fileno() == 1 and not self._has_failed:
                self._has_failed = True
                if isinstance(error, BrokenPipeError):
                    raise SystemExit(_NO_READER) from None
                error.filename = "standard output"
                raise
            return memoryview(data).nbytes


def guard_streams() -> None:
    """Make failures to write to this program's stdout and stderr known, or harmless; see ``_Stream``."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is getattr(sys, f"__{name}__") and isinstance(stream, io.TextIOWrapper):
            guarded = io.TextIOWrapper(
                io.BufferedWriter(_Stream(stream.fileno(), "w", closefd=False)),
                stream.encoding,
                stream.errors,
                line_buffering=stream.line_buffering or stream.write_through,
            )
            setattr(sys, name, guarded)

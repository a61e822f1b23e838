"""Errors and signals reported as one line on stderr, without terminal control characters."""

from __future__ import annotations

import io
import logging
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
from sparsedelta.interrupts import SIGNALS
from sparsedelta.report.text import printable

_NO_READER = 141  # 128 + SIGPIPE

# ValueError: the library rejects an argument. Any other exception is a bug and shows its traceback.
EXPECTED = (SparseDeltaError, ValueError, OSError, MemoryError)


def describe(error: BaseException) -> str:
    """Return the message of an error as one line."""
    if isinstance(error, OSError) and error.strerror:
        names = [name for name in (error.filename, error.filename2) if name is not None]
        return printable("".join(f"'{name}': " for name in names) + str(error.strerror).lower())
    if isinstance(error, MemoryError):
        return printable(f"out of memory: {error}") if str(error) else "out of memory"
    return printable(str(error)) or type(error).__name__


def report_failure(error: BaseException, *, with_traceback: bool) -> None:
    """Print an error on stderr, with its traceback if wanted, and without credentials."""
    from sparsedelta.redaction import redacted

    known = _credentials(error)
    if with_traceback:
        from sparsedelta.codecs.kernels import in_use

        lines = "".join(traceback.format_exception(error))
        click.echo(redacted(lines, known), err=True, nl=False)
        click.echo(f"kernels: {in_use()}", err=True)
    explained = (
        f" (sparsedelta explain {error.code})" if isinstance(error, SparseDeltaError) else ""
    )
    click.echo(f"error: {redacted(describe(error), known)}{explained}", err=True)


class _Warnings(logging.Handler):
    """Prints what the library warns of on stderr, one line each."""

    def emit(self, record: logging.LogRecord) -> None:
        click.echo(f"warning: {printable(record.getMessage())}", err=True)


@contextmanager
def shown_warnings() -> Iterator[None]:
    """Print the warnings of the library on stderr."""
    handler, library = _Warnings(logging.WARNING), logging.getLogger("sparsedelta")
    library.addHandler(handler)
    try:
        yield
    finally:
        library.removeHandler(handler)


def _credentials(error: BaseException) -> set[str]:
    """Return the credentials that an error may show."""
    try:
        from sparsedelta.hub.secrets import credentials
    except ValueError:  # the environment names unknown kernels, which is the error to report
        return set()
    return credentials(error)


def report_interrupt(number: int) -> None:
    """Print on stderr which signal ended the program."""
    start = "\n" if sys.stderr.isatty() else ""  # the terminal has written "^C" on this line
    name = "interrupted" if number == signal.SIGINT else f"ended by {signal.Signals(number).name}"
    click.echo(start + name, err=True)


@contextmanager
def ending_signals() -> Iterator[None]:
    """Turn SIGINT, SIGTERM and SIGHUP into ``KeyboardInterrupt(number)``, so that unfinished output is removed.

    Only the first signal raises. Launchers send several, and a later one must not stop the clean-up.
    Signals that this process already ignores, such as SIGHUP under ``nohup``, stay ignored.
    """
    defaults = (signal.SIG_DFL, signal.default_int_handler)
    caught = {number: signal.getsignal(number) for number in SIGNALS}
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
    """Standard output or error. A failed write to stderr is ignored; a failed write to stdout raises once."""

    _has_failed = False

    def write(self, data: Any, /) -> int:
        """Write bytes and return how many. Bytes that cannot be written count as written.

        Raises:
            SystemExit: the reader of stdout has closed the pipe, as ``| head`` does.
            OSError: stdout cannot be written for another reason. It is raised once.
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
    """Replace stdout and stderr by streams that handle failed writes; see ``_Stream``."""
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

"""How failures are reported: one line on stderr, free of anything that a terminal would act on."""

from __future__ import annotations

import sys
import traceback

import click

from sparsedelta.errors import SparseDeltaError
from sparsedelta.report.text import printable

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
    if with_traceback:
        click.echo("".join(traceback.format_exception(error)), err=True, nl=False)
    click.echo(f"error: {describe(error)}", err=True)


def report_interrupt() -> None:
    """Tell of Ctrl-C on stderr."""
    start = "\n" if sys.stderr.isatty() else ""  # the terminal has written "^C" on this line
    click.echo(f"{start}interrupted", err=True)

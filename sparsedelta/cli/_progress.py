"""A progress bar on stderr, shown if stderr is a terminal."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from sparsedelta.cli._common import Settings

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

    from sparsedelta.progress import Progress

_UPDATE_SECONDS = 0.1


@contextmanager
def progress_bar(settings: Settings) -> Iterator[Progress | None]:
    """Yield a progress bar, removed from the screen at the end; None if quiet or stderr is no terminal."""
    if settings.quiet or not sys.stderr.isatty():
        yield None
        return
    bar = Bar()
    try:
        yield bar
    finally:
        bar.finish()


class Bar:
    """The progress bar of the current stage; implements ``sparsedelta.progress.Progress``.

    Workers report every half megabyte. The screen is updated at most ten times a second.
    """

    def __init__(self) -> None:
        self._shown: RichProgress | None = None
        self._lock = threading.Lock()
        self._n_done = 0
        self._next_update = 0.0

    def start(self, label: str, n_bytes: int) -> None:
        """Start a stage of ``n_bytes`` bytes; its bar replaces that of the stage before."""
        self.finish()
        self._n_done, self._next_update = 0, 0.0
        shown = _make_bar()
        shown.add_task(label, total=n_bytes)
        shown.start()
        self._shown = shown

    def advance(self, n_bytes: int) -> None:
        """Add ``n_bytes`` to the bytes done. May be called from several threads."""
        with self._lock:
            self._n_done += n_bytes
            now = time.monotonic()
            if self._shown is None or now < self._next_update:
                return
            self._next_update = now + _UPDATE_SECONDS
            self._shown.update(self._shown.task_ids[0], completed=self._n_done)

    def finish(self) -> None:
        """Remove the bar from the screen."""
        with self._lock:
            shown, self._shown = self._shown, None
        if shown is not None:
            shown.stop()


def _make_bar() -> RichProgress:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )

"""The interface through which long operations report their progress."""

from __future__ import annotations

from typing import Protocol, runtime_checkable


@runtime_checkable
class Progress(Protocol):
    """Receives progress reports; the command line shows them as a progress bar."""

    def start(self, label: str, n_bytes: int) -> None:
        """Begin a stage of ``n_bytes`` bytes of work."""

    def advance(self, n_bytes: int) -> None:
        """Add ``n_bytes`` to the bytes that are done. Called from worker threads."""

    def finish(self) -> None:
        """End the stage, whether it succeeded or failed."""


class Silent:
    """A ``Progress`` that ignores all reports."""

    def start(self, label: str, n_bytes: int) -> None:
        """Ignore."""

    def advance(self, n_bytes: int) -> None:
        """Ignore."""

    def finish(self) -> None:
        """Ignore."""

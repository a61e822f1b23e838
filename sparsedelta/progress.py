"""The one interface through which long work reports how far it is."""

from __future__ import annotations

from typing import Protocol, runtime_checkable


@runtime_checkable
class Progress(Protocol):
    """A receiver of progress; the command line fills it in with a bar."""

    def start(self, label: str, n_bytes: int) -> None:
        """A stage of ``n_bytes`` bytes of work begins."""

    def advance(self, n_bytes: int) -> None:
        """``n_bytes`` more are done. Called from worker threads."""

    def finish(self) -> None:
        """The stage is over, whether it succeeded or not."""


class Silent:
    """A progress receiver that ignores everything."""

    def start(self, label: str, n_bytes: int) -> None:
        """Ignore."""

    def advance(self, n_bytes: int) -> None:
        """Ignore."""

    def finish(self) -> None:
        """Ignore."""

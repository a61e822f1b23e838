"""Arguments that are a path or a repository: a path that exists wins, and that is said."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from sparsedelta.cli._common import Settings, quiet_client
from sparsedelta.errors import AccessDenied, RemoteNotFound, Unreachable
from sparsedelta.hub.references import DELTA_SUFFIX, SCHEME, Reference, parse_reference
from sparsedelta.report.text import printable

if TYPE_CHECKING:
    from sparsedelta.format.delta import Delta
    from sparsedelta.hub.sources import RemoteBaseReport

_PATH_SUFFIXES = (DELTA_SUFFIX, ".safetensors")


class Sources(ExitStack):
    """Finds what arguments name; what it fetches is held until it is closed."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self._settings = settings

    def reference(self, text: str, *, noted: bool = True) -> Reference | None:
        """Return the repository that an argument names; None if it is a path.

        Raises:
            ValueError: it begins with ``hf://`` and names no repository.
        """
        found = parse_reference(text)
        if found is None or text.startswith(SCHEME):
            return found
        if os.path.lexists(text):
            shown = printable(text)
            if noted:
                self._settings.note(
                    f"using '{shown}' here; for the repository write {SCHEME}{shown}"
                )
            return None
        return None if text.endswith(_PATH_SUFFIXES) else found

    def paths(self, *texts: str) -> tuple[Path, ...]:
        """Return those of several arguments that are paths."""
        return tuple(Path(text) for text in texts if self.reference(text, noted=False) is None)

    def delta(self, text: str) -> Path:
        """Return where a delta is on disk."""
        reference = self._client(text)
        if reference is None:
            return Path(text)
        from sparsedelta.hub.sources import fetch_delta

        with _or_path(text):
            return fetch_delta(reference)

    def head_of_delta(self, text: str) -> Path | Delta:
        """Return a delta of which only header and manifest are to be read."""
        reference = self._client(text)
        if reference is None:
            return Path(text)
        from sparsedelta.hub.sources import remote_delta

        with _or_path(text):
            return self.enter_context(remote_delta(reference))

    def base(self, text: str, delta: Path) -> tuple[Path, tuple[Delta, ...]]:
        """Return a base for a delta on disk, and what is to be applied to it first."""
        reference = self._client(text)
        if reference is None:
            return Path(text), ()
        import sparsedelta
        from sparsedelta.hub.sources import fetched_base

        with _or_path(text):
            base = self.enter_context(
                fetched_base(reference, self.enter_context(sparsedelta.load(delta)))
            )
        self._settings.note(f"base: {printable(base.name)}")
        return base.folder, base.deltas

    def only_base(self, text: str, delta: Path) -> Path:
        """Return a base for a delta on disk that has weights of its own.

        Raises:
            RemoteNotFound: it is a repository that holds a delta.
        """
        place, before = self.base(text, delta)
        if before:
            raise RemoteNotFound(f"repository '{text}' holds a delta, not weights; pull it first")
        return place

    def word_on_base(self, text: str) -> RemoteBaseReport | None:
        """Return what the Hub shows of the base of a delta there; None for a delta that is a path."""
        reference = self.reference(text, noted=False)
        if reference is None:
            return None
        from sparsedelta.hub.sources import check_remote_base

        return check_remote_base(reference)

    def checkpoint(self, text: str) -> tuple[Path, str | None]:
        """Return where a whole checkpoint is on disk, and its name if it is a repository's."""
        reference = self._client(text)
        if reference is None:
            return Path(text), None
        from sparsedelta.hub.sources import fetched_checkpoint

        with _or_path(text):
            name, folder = self.enter_context(fetched_checkpoint(reference))
        self._settings.note(f"checkpoint: {printable(name)}")
        return folder, name

    def _client(self, text: str) -> Reference | None:
        reference = self.reference(text)
        if reference is not None:
            quiet_client(self._settings)
        return reference


@contextmanager
def _or_path(text: str) -> Iterator[None]:
    """Add to the error of a repository that is not available that no such path exists either."""
    try:
        yield
    except (RemoteNotFound, AccessDenied, Unreachable) as error:
        if text.startswith(SCHEME) or (isinstance(error, RemoteNotFound) and not error.expected):
            raise  # the repository is there, something in it is not
        raise type(error)(f"nothing is at '{text}' here, and {error}") from error

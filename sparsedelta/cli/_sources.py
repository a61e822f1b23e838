"""Arguments that may be a path or a repository. An existing path is preferred."""

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
    """Opens the deltas and checkpoints that arguments name, and keeps downloads open until it is closed."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self._settings = settings

    def reference(self, text: str) -> Reference | None:
        """Return the repository that an argument names, or None if it names a path.

        Raises:
            ValueError: it begins with ``hf://`` and names no repository.
        """
        found = parse_reference(text)
        if found is None or text.startswith(SCHEME):
            return found
        is_path = os.path.lexists(text) or text.endswith(_PATH_SUFFIXES)
        return None if is_path else found

    def paths(self, *texts: str) -> tuple[Path, ...]:
        """Return the arguments that name paths."""
        return tuple(Path(text) for text in texts if self.reference(text) is None)

    def delta(self, text: str) -> Path:
        """Return the path of a delta, downloaded if it is on the Hub."""
        reference = self._client(text)
        if reference is None:
            return Path(text)
        from sparsedelta.hub.sources import fetch_delta

        with _or_path(text):
            return fetch_delta(reference)

    def delta_metadata(self, text: str) -> Path | Delta:
        """Return a delta whose header and manifest can be read; from the Hub, only these are downloaded."""
        reference = self._client(text)
        if reference is None:
            return Path(text)
        from sparsedelta.hub.sources import remote_delta

        with _or_path(text):
            return self.enter_context(remote_delta(reference))

    def base(self, text: str, delta: Path) -> tuple[Path, tuple[Delta, ...]]:
        """Return the path of a base for a delta on disk, and deltas that must be applied to that path first."""
        reference = self._client(text)
        if reference is None:
            return Path(text), ()
        import sparsedelta
        from sparsedelta.hub.sources import fetched_base
        from sparsedelta.interop.registry import is_delta
        from sparsedelta.interop.source import Source

        if not is_delta(Source(delta)):  # only a delta of this project says which files it needs
            return self.checkpoint(text)[0], ()
        with _or_path(text):
            base = self.enter_context(
                fetched_base(reference, self.enter_context(sparsedelta.load(delta)))
            )
        self._settings.note(f"base: {printable(base.name)}")
        return base.folder, base.deltas

    def base_with_weights(self, text: str, delta: Path) -> Path:
        """Return the path of a base for a delta on disk; the base must hold weights.

        Raises:
            RemoteNotFound: the base is a repository that holds a delta.
        """
        path, before = self.base(text, delta)
        if before:
            raise RemoteNotFound(f"repository '{text}' holds a delta, not weights; pull it first")
        return path

    def remote_base_report(self, text: str) -> RemoteBaseReport | None:
        """Return what the Hub's metadata shows about the base of a delta; None if the delta is a path."""
        reference = self.reference(text)
        if reference is None:
            return None
        from sparsedelta.hub.sources import check_remote_base

        return check_remote_base(reference)

    def checkpoint(self, text: str) -> tuple[Path, str | None]:
        """Return the path of a checkpoint, and the name of its repository if it has one."""
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
    """If the repository is not available, add to the error that no path of this name exists either."""
    try:
        yield
    except (RemoteNotFound, AccessDenied, Unreachable) as error:
        if text.startswith(SCHEME) or (isinstance(error, RemoteNotFound) and not error.expected):
            raise  # the repository exists, but something in it does not
        raise type(error)(f"there is no local path '{text}', and {error}") from error

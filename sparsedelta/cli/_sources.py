"""Arguments that may be a path or a repository. An existing path is preferred."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from sparsedelta.cli._common import Settings, quiet_client
from sparsedelta.errors import RemoteNotFound
from sparsedelta.hub.references import Reference, named_repository
from sparsedelta.report.text import printable

if TYPE_CHECKING:
    from sparsedelta.format.delta import Delta
    from sparsedelta.hub.sources import RemoteBaseReport


class Sources(ExitStack):
    """Opens the deltas and checkpoints that arguments name, and keeps downloads open until it is closed."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self._settings = settings

    def paths(self, *texts: str) -> tuple[Path, ...]:
        """Return the arguments that name paths."""
        return tuple(Path(text) for text in texts if named_repository(text) is None)

    def delta(self, text: str) -> Path:
        """Return the path of a delta, downloaded if it is on the Hub."""
        reference = self._client(text)
        if reference is None:
            return Path(text)
        from sparsedelta.hub.sources import fetch_delta, or_path

        with or_path(text):
            return fetch_delta(reference)

    def delta_metadata(self, text: str) -> Path | Delta:
        """Return a delta whose header and manifest can be read; from the Hub, only these are downloaded."""
        reference = self._client(text)
        if reference is None:
            return Path(text)
        from sparsedelta.hub.sources import or_path, remote_delta

        with or_path(text):
            return self.enter_context(remote_delta(reference))

    def base(self, text: str, delta: Path) -> tuple[Path, tuple[Delta, ...]]:
        """Return the path of a base for a delta on disk, and deltas that must be applied to that path first."""
        reference = self._client(text)
        if reference is None:
            return Path(text), ()
        import sparsedelta
        from sparsedelta.hub.sources import fetched_base, or_path
        from sparsedelta.interop.registry import is_delta
        from sparsedelta.interop.source import Source

        if not is_delta(Source(delta)):  # only a delta of this project says which files it needs
            return self.checkpoint(text)[0], ()
        with or_path(text):
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
        reference = named_repository(text)
        if reference is None:
            return None
        from sparsedelta.hub.sources import check_remote_base

        return check_remote_base(reference)

    def checkpoint(self, text: str) -> tuple[Path, str | None]:
        """Return the path of a checkpoint, and the name of its repository if it has one."""
        reference = self._client(text)
        if reference is None:
            return Path(text), None
        from sparsedelta.hub.sources import fetched_checkpoint, or_path

        with or_path(text):
            name, folder = self.enter_context(fetched_checkpoint(reference))
        self._settings.note(f"checkpoint: {printable(name)}")
        return folder, name

    def _client(self, text: str) -> Reference | None:
        reference = named_repository(text)
        if reference is not None:
            quiet_client(self._settings)
        return reference

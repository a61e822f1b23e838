"""A folder of versions that slime and miles let SGLang pull (``POST /pull_weights``), written from a channel.

``weight_v000007/`` is a full checkpoint, or the changes since ``weight_v000006/``. A version appears in one step, so a
process may be killed at any moment.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from contextlib import ExitStack
from pathlib import Path

from sparsedelta._typing import AnyPath
from sparsedelta.channel.channel import open_channel
from sparsedelta.channel.follower import Follower
from sparsedelta.channel.objects import Pruned, fetch
from sparsedelta.channel.versions import Versions
from sparsedelta.errors import BadVersion, Behind, LossyConversion, StructureMismatch
from sparsedelta.fs import staged_output, temporary_folder
from sparsedelta.interop.conversion import convert

_log = logging.getLogger(__name__)
_NAME = re.compile(r"weight_v(\d{6})")
_CHECKPOINT = "checkpoint"


class PulledFolder:
    """Writes each version of a channel into a folder from which engines pull. One process may do so at a time."""

    def __init__(
        self,
        channel: Versions | AnyPath,
        source_dir: AnyPath,
        *,
        encoding: str = "xor",
        checksum: str = "blake3",
        base: AnyPath | None = None,
    ) -> None:
        """Store the arguments; nothing is read yet.

        Args:
            channel: the channel to follow.
            source_dir: the ``source_dir`` of ``/pull_weights``. It belongs to this object. Besides the versions it
                holds ``checkpoint/``, a full copy of the latest one.
            encoding: ``"xor"`` or ``"overwrite"``.
            checksum: ``"blake3"``, ``"xxh3-128"`` or ``"adler32"``.
            base: the checkpoint that the anchors are deltas on, if the publisher uses one.
        """
        self._channel = channel = open_channel(channel, ExitStack())
        self._root = Path(source_dir)
        self._settings = {"encoding": encoding, "checksum": checksum}
        self._follower = Follower(channel, self._root / _CHECKPOINT, base=base)

    @property
    def version(self) -> int | None:
        """The latest version in the folder; None: there is none. It is the ``target_version`` to pull."""
        found = [_NAME.fullmatch(path.name) for path in self._root.glob("weight_v*")]
        return max((int(name[1]) for name in found if name), default=None)

    def sync(self, version: int | None = None) -> int:
        """Write the versions that the folder lacks, up to a version; return the latest one in the folder.

        After any error it is safe to call again.

        Args:
            version: its number; None for the latest.

        Raises:
            Behind: the channel does not have the version yet, or no longer.
            BadVersion: an entry or object is damaged.
            Uncertain: ``checkpoint/`` was changed by something else. The next call rebuilds it.
            StructureMismatch: the version is a single file.
            OSError, RemoteError: the store failed, or the disk is full.
            ValueError: a setting is wrong.
        """
        head = self._channel.head() if version is None else None
        target = self._channel.entry(version or (head.version if head else 1)).version
        self._root.mkdir(parents=True, exist_ok=True)
        last = self.version
        while last is None or last < target:
            last = self._next(last, target)
        return last

    def _next(self, last: int | None, target: int) -> int:
        """Write the version after the last one, or the target in full if there is no way from the last one."""
        if last is not None and self._write_changes(last + 1):
            return last + 1
        self._follower.sync(target)
        held = self._root / _CHECKPOINT
        if not held.is_dir():
            raise StructureMismatch(
                f"version {target} is a single file, and engines pull folders; publish a folder, or a model with the"
                " files of one (folder=)"
            )
        with staged_output(self._folder(target), overwrite=False) as staged:
            shutil.copytree(held, staged, copy_function=_linked)
        return target

    def _write_changes(self, version: int) -> bool:
        """Write the changes from the version before; return whether that was possible."""
        entry = self._channel.entry(version)
        if entry.delta is None:
            return False
        settings: dict[str, str | int] = {
            "version": version,
            "base_version": version - 1,
            **self._settings,
        }
        try:
            self._follower.sync(version - 1)
            with (
                fetch(self._channel, "deltas", version, entry.delta) as file,
                temporary_folder("pulled") as folder,
            ):
                with open(folder / "delta.sd", "xb") as copy:
                    shutil.copyfileobj(file, copy)
                convert(
                    folder / "delta.sd",
                    self._folder(version),
                    base=self._root / _CHECKPOINT,
                    write_as="slime",
                    settings=settings,
                )
        except (Pruned, Behind, BadVersion, LossyConversion) as error:
            _log.info("version %d is written in full: %s", version, error)
            return False
        return True

    def _folder(self, version: int) -> Path:
        return self._root / f"weight_v{version:06d}"


def _linked(source: str, copy: str) -> None:
    """Give a file a second name, since the files of a follower are replaced and never changed; or copy it."""
    try:
        os.link(source, copy)
    except OSError:  # a file system without links
        shutil.copy2(source, copy)
        with open(copy, "r+b") as file:  # Windows syncs only what is open for writing
            os.fsync(file.fileno())

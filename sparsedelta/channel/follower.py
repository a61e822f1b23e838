"""``Follower``: keeps a model in memory, or a checkpoint on disk, at a version of a channel."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from sparsedelta._typing import AnyPath, Model, Names
from sparsedelta.channel.following import Pursuit, SyncReport
from sparsedelta.channel.replicas import DiskReplica, ModelReplica
from sparsedelta.channel.versions import Versions
from sparsedelta.progress import Progress


class Follower:
    """Keeps a model in memory, or a checkpoint on disk, at a version of a channel.

    What is held changes only when all that it takes is read and checked, and at once: a model while no thread is
    within ``reading``, a checkpoint on disk by an exchange of names. Methods must not be called from several threads, but
    for ``reading``.
    """

    def __init__(
        self,
        channel: Versions,
        model_or_path: Model | AnyPath,
        *,
        base: AnyPath | None = None,
        names: Names = None,
        overwrite: bool = False,
        progress: Progress | None = None,
    ) -> None:
        """Prepare; nothing is read.

        Args:
            channel: what is followed. Where it can be written, leases are taken, so that nothing is pruned while it
                is read.
            model_or_path: a ``torch.nn.Module`` or a state dict, whose tensors are changed; or the path of a folder or
                file, which is made and replaced.
            base: the checkpoint that anchors are applied to, if the publisher has made them so. A model that is this
                checkpoint needs none.
            names: of a model's tensors; see ``Delta.apply_``.
            overwrite: replace what is at a path even if it is no version of the channel.
            progress: told of the bytes written to disk.
        """
        self._lock = None
        if isinstance(model_or_path, str | os.PathLike):
            disk = DiskReplica(model_or_path, base=base, overwrite=overwrite, progress=progress)
            self._pursuit = Pursuit(channel, disk)
        else:
            model = ModelReplica(model_or_path, base=base, names=names)
            self._lock = model.lock
            self._pursuit = Pursuit(channel, model)

    @property
    def version(self) -> int | None:
        """The version that is held; None: none that is known."""
        held = self._pursuit.held
        return held.version if held else None

    def sync(self, version: int | None = None) -> SyncReport:
        """Move to a version; return what was done. After any error, call again.

        The first call finds out by digests which version is held, if any.

        Args:
            version: its number; None: the latest. One before the version that is held is possible too.

        Raises:
            Behind: the channel does not have the version (yet, or any longer). What is held is as it was.
            BadVersion: an entry or object is damaged. What is held is as it was.
            Uncertain: something else has changed what is held, or a write could neither be finished nor taken back.
                The next call rebuilds it from an anchor.
            StructureMismatch: the model lacks a tensor of the version, or has it with another dtype or shape.
            FileExistsError: what is at the path is no version of the channel, and ``overwrite`` is false.
            OSError, RemoteError: the store failed, or there is no room.
        """
        return self._pursuit.sync(version)

    @contextmanager
    def reading(self) -> Iterator[int | None]:
        """Use the model while ``sync`` does not write to it; yields the version that is held.

        Threads read together. A thread must not call ``sync`` while it reads.

        Raises:
            TypeError: the follower keeps a checkpoint on disk.
        """
        if self._lock is None:
            raise TypeError("this follower keeps a checkpoint on disk; open it instead")
        with self._lock.reading():
            yield self.version

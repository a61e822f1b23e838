"""``Follower``: updates a model in memory, or a checkpoint on disk, to versions of a channel."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, ExitStack

from sparsedelta._typing import AnyPath, Model, Names
from sparsedelta.channel.channel import check_outside, open_channel
from sparsedelta.channel.entry import checked_number
from sparsedelta.channel.following import Pursuit, SyncReport
from sparsedelta.channel.following_ranks import RankPursuit, RankReplica
from sparsedelta.channel.model_replica import ModelReplica
from sparsedelta.channel.replicas import DiskReplica
from sparsedelta.channel.versions import Versions
from sparsedelta.live.ranks import Ranks, group_of
from sparsedelta.ops.apply import check_no_input
from sparsedelta.progress import Progress


class Follower:
    """Updates a model in memory, or a checkpoint on disk, to versions of a channel.

    A version is read and checked completely before anything changes. A model is written while no thread is inside
    ``reading``. A checkpoint on disk is replaced in one step. Except for ``reading``, call the methods from one thread.
    It can be used as a context, which closes it.

    If the model is divided among ranks (FSDP2, tensor parallelism), all ranks make a follower and call ``sync`` at the same
    time. Rank 0 uses the channel. All ranks become the version that it finds, or none does, and all raise the same error.
    """

    def __init__(
        self,
        channel: Versions | AnyPath,
        model_or_path: Model | AnyPath,
        *,
        base: AnyPath | None = None,
        names: Names = None,
        overwrite: bool = False,
        progress: Progress | None = None,
    ) -> None:
        """Store the arguments; nothing is read yet.

        Args:
            channel: the channel to follow; of a divided model, only rank 0 uses it. If its store is writable, the
                follower takes leases, so that nothing is pruned while it is read. A path or URL is opened as by
                ``Channel``, and closed with the follower.
            model_or_path: a ``torch.nn.Module`` or a state dict, whose tensors are changed in place; or the path of a
                folder or file, which is created and replaced.
            base: the checkpoint that the anchors are deltas on, if the publisher uses one. It is not needed if the
                model holds this checkpoint. Of a divided model, only rank 0 reads it.
            names: maps names of tensors to names in the model; see ``Delta.apply_``.
            overwrite: replace the folder or file even if no follower has written it.
            progress: receives the number of bytes written to disk.

        Raises:
            TypeError: ``channel`` is neither a channel nor a path or URL.
            ValueError: the folder or file is, contains or lies in the folder of the channel or the base.
        """
        replica: DiskReplica | ModelReplica
        with ExitStack() as context:
            if isinstance(model_or_path, str | os.PathLike):
                replica = DiskReplica(
                    model_or_path, base=base, overwrite=overwrite, progress=progress
                )
            elif isinstance(ranks := group_of(model_or_path), Ranks):
                replica = RankReplica(model_or_path, ranks, base=base, names=names)
            else:
                replica = ModelReplica(model_or_path, base=base, names=names)
            self._lock = None if isinstance(replica, DiskReplica) else replica.lock
            self._pursuit: Pursuit | RankPursuit
            if isinstance(replica, RankReplica):
                self._pursuit = RankPursuit(lambda: open_channel(channel, context), replica)
            else:
                opened = open_channel(channel, context)
                if isinstance(model_or_path, str | os.PathLike):
                    check_outside(opened, model_or_path, "output")
                    check_no_input([] if base is None else [base], model_or_path)
                self._pursuit = Pursuit(opened, replica)
            self._context = context.pop_all()

    def __repr__(self) -> str:
        return f"<Follower at {'no known version' if self.version is None else f'version {self.version}'}>"

    def __enter__(self) -> Follower:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the channel, if its path or URL was given."""
        self._context.close()

    @property
    def version(self) -> int | None:
        """The number of the current version; None if it is unknown, as after ``Uncertain``."""
        held = self._pursuit.held
        return held.version if held else None

    def sync(self, version: int | None = None) -> SyncReport:
        """Update to a version; return a report. After any error it is safe to call again.

        The first call compares digests to find the current version.

        Args:
            version: number of the version, which may be older than the current one; None for the latest.

        Raises:
            Behind: the channel does not have the version yet, or no longer. Nothing was changed.
            BadVersion: an entry or object is damaged. Nothing was changed.
            Uncertain: the model or checkpoint was changed by something else, or a write could neither be completed
                nor undone. The next call rebuilds it from an anchor.
            StructureMismatch: the model lacks a tensor of the version, or has it with another dtype or shape.
            FileExistsError: the path holds something that no follower has written, and ``overwrite`` is false.
            OSError, RemoteError: the store failed, or the disk is full.
            ConflictError: the ranks that divide a model give different versions.
            SparseDeltaError: the connection to a rank was lost.
            ValueError: ``version`` is no integer above 0.
        """
        return self._pursuit.sync(
            None if version is None else checked_number("version", version, 1)
        )

    def reading(self) -> AbstractContextManager[int | None]:
        """Return a context in which ``sync`` does not write to the model; it gives the current version.

        Several threads may read at once. A thread must not call ``sync`` while it reads: it would wait for itself. ``sync`` reads back what it
        has written while others may read already. If the model does not hold these values, because its memory is
        faulty or something else writes to it, ``sync`` raises Uncertain, and the context gives None: the model
        holds no known version.

        Raises:
            TypeError: the follower keeps a checkpoint on disk.
        """
        if self._lock is None:
            raise TypeError("this follower keeps a checkpoint on disk; open it instead")
        return self._lock.reading(lambda: self.version)

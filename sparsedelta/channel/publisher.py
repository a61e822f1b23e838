"""Adds versions to a channel: from a model in memory (``Publisher``), or from a checkpoint on disk."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Literal

from sparsedelta._typing import JSON, AnyPath, Model
from sparsedelta.channel.entry import Entry
from sparsedelta.channel.publishing import AnchorRule, Run
from sparsedelta.channel.sources import CheckpointSource, Coding, ModelSource, OutsideBase
from sparsedelta.channel.versions import Versions
from sparsedelta.errors import BaseMismatch
from sparsedelta.files.checkpoint import Checkpoint
from sparsedelta.live.snapshot import Snapshot
from sparsedelta.ops.diff import check_json
from sparsedelta.ops.identity import checkpoint_fingerprint
from sparsedelta.progress import Progress


class Publisher:
    """Adds versions of a model to a channel.

    If the model equals the head of the channel, as it may after a restart, the next version is a delta on the head.
    Otherwise the next version is written in full, and followers switch to it without further action.

    Not safe for use from several threads. The model must not change while a method runs.
    """

    def __init__(
        self,
        channel: Versions,
        model: Model,
        *,
        folder: AnyPath | None = None,
        keep_on: Literal["cpu", "model", "both"] = "cpu",
        anchor_ratio: float | None = 1.0,
        anchor_every: int | None = None,
        anchor_base: AnyPath | None = None,
        anchor_base_id: str | None = None,
        values: str = "ulp",
        level: str = "default",
        standalone: bool = False,
        progress: Progress | None = None,
    ) -> None:
        """Copy the model, and compare it with the head of the channel.

        Args:
            channel: the channel to add versions to; its store must be writable.
            model: a ``torch.nn.Module`` or a state dict, on any device; see ``Snapshot``.
            folder: a checkpoint of this model; the versions then have its files; see ``Snapshot``.
            keep_on: where the copy of the last published version is; see ``Snapshot``.
            anchor_ratio: write an anchor when the deltas since the last anchor have more bytes than this ratio
                times that anchor; None to ignore their size.
            anchor_every: write an anchor when the last one is this number of versions old; None to ignore its age.
            anchor_base: a checkpoint that all followers have, such as the one with which the training began.
                Anchors are then deltas on it. None: anchors hold all tensors.
            anchor_base_id: where followers may find it, such as ``org/model@<commit>``.
            values: how deltas are coded; see ``sparsedelta.diff``.
            level: the same.
            standalone: the same.
            progress: receives the number of bytes read.

        Raises:
            StructureMismatch: see ``Snapshot``.
            BadVersion: the store holds no channel, or a damaged one.
            ValueError: an argument is wrong.
        """
        snapshot = Snapshot(model, folder=folder, keep_on=keep_on, progress=progress)
        base = None if anchor_base is None else OutsideBase(anchor_base, anchor_base_id)
        source = ModelSource(snapshot, Coding(values, level, standalone), base, progress)
        self._run = Run(channel, source, AnchorRule(anchor_ratio, anchor_every))

    @property
    def run(self) -> str:
        """The id of this publisher; it is recorded in its entries."""
        return self._run.id

    @property
    def is_at_head(self) -> bool:
        """Whether the last published version is the head; if not, the next version is written in full."""
        return self._run.is_at_head

    def publish(self, step: int | None = None, info: Mapping[str, JSON] | None = None) -> Entry:
        """Add a version with the model's current weights; return its entry once it is durable.

        The next delta is made on this version only after that. After an error of the store, call again: the
        version is completed if its entry was written, and otherwise made anew.

        Args:
            step: number of the training step.
            info: any JSON object, recorded in the entry.

        Raises:
            HeadMoved: another publisher has added a version since this one was created; only one can continue.
            StructureMismatch: the model has other tensors than before; make a new publisher.
            OSError, RemoteError: the store failed.
        """
        return self._run.publish(step=step, info=check_json(info or {}, "info"))


def publish_checkpoint(
    channel: Versions,
    checkpoint: AnyPath,
    *,
    base: AnyPath | None = None,
    step: int | None = None,
    info: Mapping[str, JSON] | None = None,
    anchor_ratio: float | None = 1.0,
    anchor_every: int | None = None,
    anchor_base: AnyPath | None = None,
    anchor_base_id: str | None = None,
    values: str = "ulp",
    level: str = "default",
    standalone: bool = False,
    progress: Progress | None = None,
) -> Entry | None:
    """Add a checkpoint on disk to a channel; return its entry once it is durable.

    Args:
        channel: the channel to add it to.
        checkpoint: a safetensors file or a folder.
        base: the checkpoint that was published last; the version is then a delta on it. None: it is written in full.
        step: number of the training step.
        info: any JSON object, recorded in the entry.
        anchor_ratio: see ``Publisher``.
        anchor_every: the same.
        anchor_base: the same.
        anchor_base_id: the same.
        values: see ``sparsedelta.diff``.
        level: the same.
        standalone: the same.
        progress: receives the number of bytes read.

    Returns:
        None if no base is given and the head has the same tensors already.

    Raises:
        BaseMismatch: ``base`` is not the head of the channel.
        HeadMoved: another publisher added a version in the meantime.
        CheckpointError: a checkpoint cannot be read.
        OSError, RemoteError: the store failed.
    """
    with ExitStack() as context:
        new = context.enter_context(Checkpoint(checkpoint, include=()))
        old = None
        if base is not None:
            old = context.enter_context(Checkpoint(base, include=(), whole=False))
        outside = None if anchor_base is None else OutsideBase(anchor_base, anchor_base_id)
        source = CheckpointSource(new, old, Coding(values, level, standalone), outside, progress)
        head = channel.head()
        if head and old is None and checkpoint_fingerprint(new, progress=progress) == head.target:
            return None
        run = Run(channel, source, AnchorRule(anchor_ratio, anchor_every))
        if old is not None and not run.is_at_head:
            found = f"version {head.version}" if head else "empty"
            raise BaseMismatch(
                f"base '{base}' is not the head of channel '{channel.store.name}', which is {found};"
                " give the checkpoint that was published last, or no base to publish in full"
            )
        return run.publish(step=step, info=check_json(info or {}, "info"))

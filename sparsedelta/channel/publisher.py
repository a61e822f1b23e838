"""Adds versions to a channel: from a model in memory (``Publisher``), or from a checkpoint on disk."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import islice
from typing import Literal, Self

from sparsedelta._typing import JSON, AnyPath, Model
from sparsedelta.channel.channel import check_outside, open_channel
from sparsedelta.channel.entry import Entry
from sparsedelta.channel.latest import Latest, read_latest
from sparsedelta.channel.publication import Publication
from sparsedelta.channel.publishing import AnchorRule, Run
from sparsedelta.channel.sources import CheckpointSource, Coding, ModelSource, OutsideBase
from sparsedelta.channel.versions import Versions
from sparsedelta.errors import BaseMismatch
from sparsedelta.files.checkpoint import Checkpoint
from sparsedelta.format.records import TensorSpec
from sparsedelta.live.snapshot import Snapshot
from sparsedelta.live.trained import Trained
from sparsedelta.ops.diff import check_json
from sparsedelta.ops.identity import checkpoint_fingerprint
from sparsedelta.progress import Progress

_N_SEARCHED = 32  # versions in which an error looks for the base


class Background:
    """Adds the versions of a run in the background; see ``Publisher``.

    Args:
        run: the run.
        context: closed at the end.
    """

    def __init__(self, run: Run, context: ExitStack) -> None:
        self._run = run
        self._context = context
        self._last: Publication | None = None
        self._is_closed = False

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of run {self.run}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def run(self) -> str:
        """The id of this publisher; it is recorded in its entries."""
        return self._run.id

    @property
    def is_at_head(self) -> bool:
        """Whether the last durable version is the head; if not, the next version is written in full."""
        return self._run.is_at_head

    def publish(
        self, step: int | None = None, info: Mapping[str, JSON] | None = None
    ) -> Publication:
        """Copy what has changed in the model, and begin to add it as a version; ``.result()`` waits until it is durable.

        The call takes about as long as a copy of the weights, if the version before is durable already; otherwise it
        waits for that first. The copy has the changed elements only: of each tensor at most as many bytes as the
        tensor has. An error of the version before is raised here, unless its ``result`` has raised it; nothing is
        copied then.

        After an error of the store, call again: the version that failed is completed if its entry was written.
        Otherwise the new version has its changes too.

        Args:
            step: number of the training step.
            info: any JSON object, recorded in the entry.

        Raises:
            HeadMoved: another publisher has added a version since this one was created; only one can continue.
            BadVersion: the channel no longer has the version that was published last, or is damaged.
            StructureMismatch: the model has other tensors than before; make a new publisher.
            OSError, RemoteError: the store failed.
            ValueError: the publisher is closed, ``step`` is not an integer from 0 to 2^63 - 1, or ``info``
                is not JSON.
        """
        if self._is_closed:
            raise ValueError("the publisher is closed; make a new one")
        checked = check_json(info or {}, "info")
        if self._last:
            self._last.raise_unreported()
        captured = self._run.capture(step=step, info=checked)
        self._last = Publication(partial(self._run.add, captured))
        return self._last

    def close(self) -> None:
        """Wait until the last version is durable; ``publish`` cannot be called afterwards.

        Raises:
            HeadMoved, OSError, RemoteError: the last version has failed, and ``result`` has not raised the error.
        """
        self._is_closed = True
        with self._context:
            if self._last:
                self._last.raise_unreported()


class Publisher(Background):
    """Adds versions of a model to a channel.

    If the model equals the head of the channel, as it may after a restart, the next version is a delta on the head.
    Otherwise the next version is written in full, and followers switch to it without further action.

    ``publish`` copies what has changed and returns; a thread encodes and stores it. At most one version is on its
    way: the next call waits for it. Use the publisher as a context, or call ``close`` at the end.

    Not safe for use from several threads. The model must not change while a method runs.
    """

    def __init__(
        self,
        channel: Versions | AnyPath,
        model: Model,
        *,
        folder: AnyPath | None = None,
        keep_on: Literal["cpu", "model", "both"] = "cpu",
        trained: Trained | None = None,
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
            channel: the channel to add versions to; its store must be writable. A path or URL is opened as by
                ``Channel``, and closed with the publisher.
            model: a ``torch.nn.Module`` or a state dict, on any device; see ``Snapshot``.
            folder: a checkpoint of this model; the versions then have its files; see ``Snapshot``.
            keep_on: where the copy of the last published version is; see ``Snapshot``.
            trained: which elements a training changes; the publisher then keeps these and no copy of the model; see
                ``Snapshot``.
            anchor_ratio: write an anchor when the deltas since the last anchor have more bytes than this ratio
                times that anchor; None to ignore their size.
            anchor_every: write an anchor when the last one is this number of versions old; None to ignore its age.
            anchor_base: a checkpoint that all followers have, such as the one with which the training began.
                Anchors are then deltas on it. None: anchors hold all tensors.
            anchor_base_id: where followers may find it, such as ``org/model@<commit>``.
            values: how deltas are coded; see ``sparsedelta.diff``.
            level: the same. Anchors that hold all tensors are always written at level ``"fast"``, which takes a
                fraction of the time and makes them no larger.
            standalone: the same.
            progress: receives the number of bytes read, also from the thread that encodes.

        Raises:
            StructureMismatch: see ``Snapshot``.
            BadVersion: the store holds no channel, or a damaged one.
            ValueError: an argument is wrong; or the channel's versions are single files and a folder is given, or
                the reverse.
            TypeError: ``channel`` is neither a channel nor a path or URL, or ``model`` is a path.
        """
        if isinstance(model, str | os.PathLike):
            raise TypeError(
                f"model is the path '{os.fspath(model)}', expected a torch.nn.Module or a state dict; the command `sparsedelta"
                " publish` publishes a checkpoint on disk"
            )
        with ExitStack() as context:
            opened = open_channel(channel, context)
            if folder is not None:
                check_outside(opened, folder, "folder")
            snapshot = Snapshot(
                model, folder=folder, keep_on=keep_on, trained=trained, progress=progress
            )
            base = None if anchor_base is None else OutsideBase(anchor_base, anchor_base_id)
            source = ModelSource(snapshot, Coding(values, level, standalone), base, progress)
            run = Run(opened, source, AnchorRule(anchor_ratio, anchor_every), opened.head())
            check_model(opened, run, snapshot.specs, is_folder=snapshot.is_folder)
            super().__init__(run, context.pop_all())


def check_model(
    channel: Versions, run: Run, tensors: Mapping[str, TensorSpec], *, is_folder: bool
) -> None:
    """Check that a model is published as the channel's latest version is; log a warning if it is another model.

    Args:
        channel: where it is published.
        run: of the publisher, before its first version.
        tensors: of the model, by name.
        is_folder: whether the versions of the run are folders.

    Raises:
        ValueError: the latest version is one file and those of the run are folders, or the reverse.
    """
    latest = read_latest(channel, run.head)
    if latest is None:
        return
    remedy = (
        "leave out the folder (folder=)"
        if is_folder
        else "give the folder of a checkpoint of this model (folder=)"
    )
    latest.check_kind("what this publisher adds", is_folder=is_folder, remedy=remedy)
    if not run.is_at_head:
        latest.warn(tensors)


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
    exclude: Sequence[str] = (),
    values: str = "ulp",
    level: str = "default",
    standalone: bool = False,
    progress: Progress | None = None,
) -> Entry | None:
    """Add a checkpoint on disk to a channel; return its entry once it is durable.

    Args:
        channel: the channel to add it to.
        checkpoint: a safetensors file or a folder.
        base: a checkpoint with the tensors of the version that was published last; the version is then a delta on that
            version. None: it is written in full.
        step: number of the training step.
        info: any JSON object, recorded in the entry.
        anchor_ratio: see ``Publisher``.
        anchor_every: the same.
        anchor_base: the same.
        anchor_base_id: the same.
        exclude: globs of files of ``checkpoint`` and ``base`` to leave out, as for ``sparsedelta.diff``.
        values: see ``sparsedelta.diff``.
        level: the same.
        standalone: the same.
        progress: receives the number of bytes read.

    Returns:
        None if nothing was added, because ``checkpoint`` is the head already, other files included, with ``step`` and
        ``info`` if they are given.

    Raises:
        BaseMismatch: ``base`` is not the head of the channel.
        HeadMoved: another publisher added a version in the meantime.
        CheckpointError: a checkpoint cannot be read.
        OSError, RemoteError: the store failed.
        ValueError: the versions of the channel are single files and ``checkpoint`` is a folder, or the reverse.
    """
    check_outside(channel, checkpoint, "checkpoint")
    with ExitStack() as context:
        new = context.enter_context(Checkpoint(checkpoint, exclude=exclude, include=()))
        old = None
        if base is not None:
            old = context.enter_context(Checkpoint(base, exclude=exclude, include=(), whole=False))
        outside = None if anchor_base is None else OutsideBase(anchor_base, anchor_base_id)
        head = channel.head()
        latest = read_latest(channel, head)
        held = latest.target if latest else None
        coding = Coding(values, level, standalone)
        source = CheckpointSource(new, old, held, coding, outside, progress)
        context.callback(source.close)
        if latest:
            remedy = (
                f"give {'its weight file' if new.is_folder else 'the folder of the checkpoint'}"
            )
            latest.check_kind(f"'{checkpoint}'", is_folder=new.is_folder, remedy=remedy)
        run = Run(channel, source, AnchorRule(anchor_ratio, anchor_every), head)

        def fingerprint() -> bytes:
            # At the head, the change is needed anyway.
            return (
                source.change()[1]
                if run.is_at_head
                else checkpoint_fingerprint(new, progress=progress)
            )

        if head and latest and _is_published(new, head, latest, step, info, fingerprint):
            return None
        if old is not None and not run.is_at_head:
            raise _other_base(channel, head, old)
        if latest:
            latest.warn({tensor.name: tensor.spec for tensor in new.tensors.values()})
        return run.publish(step=step, info=check_json(info or {}, "info"))


def _is_published(
    checkpoint: Checkpoint,
    head: Entry,
    latest: Latest,
    step: int | None,
    info: Mapping[str, JSON] | None,
    fingerprint: Callable[[], bytes],
) -> bool:
    """Return whether a checkpoint is the latest version, with its step and info if they are given."""
    return (
        step in (None, head.step)
        and (not info or check_json(info, "info") == head.info)
        and latest.has_files_of(checkpoint)
        and fingerprint() == head.target
    )


def _other_base(channel: Versions, head: Entry | None, base: Checkpoint) -> BaseMismatch:
    """Return the error about a base that is not the latest version; it says which of the last versions it is."""
    where = f"channel '{channel.store.name}'"
    if head is None:
        return BaseMismatch(
            f"base '{base.path}' is no version of {where}, which has none yet; leave out the base (--base): the first"
            " version is written in full"
        )
    found = checkpoint_fingerprint(base)
    last = islice(channel.back(head), _N_SEARCHED)
    number = next((entry.version for entry in last if entry.target == found), None)
    is_which = f"version {number}" if number else "not the latest version"
    step = "" if head.step is None else f" (step {head.step})"
    return BaseMismatch(
        f"base '{base.path}' is {is_which} of {where}, whose latest version is {head.version}{step}; give the checkpoint"
        f" of version {head.version} as the base, or leave out the base (--base) to publish in full"
    )

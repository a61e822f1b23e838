"""What can be published: a model in memory, or a checkpoint on disk (``channel.publishing.Source``)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from sparsedelta._typing import AnyPath
from sparsedelta.channel.entry import AnchorBase
from sparsedelta.channel.publishing import Change
from sparsedelta.errors import SparseDeltaError
from sparsedelta.files.checkpoint import Checkpoint
from sparsedelta.format.delta import Delta
from sparsedelta.format.records import Target
from sparsedelta.live.capture import Capture
from sparsedelta.live.snapshot import Snapshot
from sparsedelta.ops.diff import between
from sparsedelta.ops.identity import checkpoint_fingerprint
from sparsedelta.progress import Progress


@dataclass(frozen=True, slots=True)
class Coding:
    """How deltas are coded; see ``sparsedelta.diff``."""

    values: str = "ulp"
    level: str = "default"
    standalone: bool = False


@dataclass(frozen=True, slots=True)
class OutsideBase:
    """A checkpoint that anchors are made from, which followers have.

    Attributes:
        path: where it is.
        id: where followers may find it, such as ``org/model@<commit>``.
    """

    path: AnyPath
    id: str | None = None


class ModelSource:
    """A model in memory, with a snapshot of what was published last."""

    def __init__(
        self,
        snapshot: Snapshot,
        coding: Coding,
        base: OutsideBase | None,
        progress: Progress | None,
    ) -> None:
        self._snapshot = snapshot
        self._coding = coding
        self._base = base
        self._progress = progress

    def is_at(self, target: bytes) -> bool:
        """Return whether the snapshot has this fingerprint."""
        if self._snapshot.fingerprint != target:
            return False
        self._snapshot.carry_side_files()  # a fingerprint says nothing of them
        return True

    def capture(self) -> CapturedModel:
        """Return what the model is now."""
        return CapturedModel(self._snapshot.capture(), self._coding, self._base, self._progress)

    def advance(self, change: Change) -> None:
        """Move the snapshot to the target of a change."""
        if not isinstance(change, Delta):
            raise TypeError(f"change is of type {type(change).__name__}, expected a Delta")
        self._snapshot.advance(change)


@dataclass(frozen=True, slots=True)
class CapturedModel:
    """A model as it was (``channel.publishing.Weights``); see ``ModelSource``."""

    capture: Capture
    coding: Coding
    base: OutsideBase | None
    progress: Progress | None

    def change(self) -> tuple[Delta, bytes]:
        """Return the delta from the snapshot to the model, and the fingerprint of the model."""
        coding = self.coding
        return with_target(
            self.capture.diff(
                values=coding.values,
                level=coding.level,
                standalone=coding.standalone,
                progress=self.progress,
            )
        )

    def anchor(self) -> tuple[Delta, bytes, AnchorBase | None]:
        """Return an anchor of the model, the model's fingerprint, and what the anchor is applied to."""
        return anchor_of(self.capture, self.base, self.coding, self.progress)


class CheckpointSource:
    """A checkpoint on disk, and the checkpoint that was published last, if there is one.

    Args:
        checkpoint: is published.
        previous: has the tensors of the version that was published last; None: the version is written in full.
        held: the files of that version; None if they are not known, and the delta carries all side files.
        coding: how deltas are coded.
        base: of anchors.
        progress: receives the number of bytes read.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        previous: Checkpoint | None,
        held: Target | None,
        coding: Coding,
        base: OutsideBase | None,
        progress: Progress | None,
    ) -> None:
        self._checkpoint = checkpoint
        self._previous = previous
        self._held = held.side_files if held else ()
        self._coding = coding
        self._base = base
        self._progress = progress
        self._change: tuple[Change, bytes] | None = None

    def is_at(self, target: bytes) -> bool:
        """Return whether the checkpoint that was published last has this fingerprint."""
        previous = self._previous
        return previous is not None and checkpoint_fingerprint(previous) == target

    def capture(self) -> CheckpointSource:
        """Return this object: the checkpoint does not change."""
        return self

    def change(self) -> tuple[Change, bytes]:
        """Return the delta from one checkpoint to the other, and the fingerprint of the latter."""
        if self._change is None:
            self._change = self._compared()
        return self._change

    def close(self) -> None:
        """Close the delta."""
        if self._change:
            self._change[0].close()

    def _compared(self) -> tuple[Change, bytes]:
        if self._previous is None:
            return _Nothing(), checkpoint_fingerprint(self._checkpoint, progress=self._progress)
        coding = self._coding
        return with_target(
            between(
                self._previous,
                self._checkpoint,
                values=coding.values,
                level=coding.level,
                standalone=coding.standalone,
                progress=self._progress,
                held={file.path: (file.n_bytes, file.digest) for file in self._held},
            )
        )

    def anchor(self) -> tuple[Delta, bytes, AnchorBase | None]:
        """Return an anchor of the checkpoint, its fingerprint, and what the anchor is applied to."""
        return anchor_of(self._checkpoint, self._base, self._coding, self._progress)

    def advance(self, change: Change) -> None:
        """Do nothing: a checkpoint is published once."""


class _Nothing:
    """Stands for a delta that is not made."""

    def blocks(self) -> Iterator[bytes]:
        """Raise an error: there are none."""
        raise SparseDeltaError("no delta was made")

    def close(self) -> None:
        """Do nothing."""


def anchor_of(
    now: Checkpoint, base: OutsideBase | None, coding: Coding, progress: Progress | None
) -> tuple[Delta, bytes, AnchorBase | None]:
    """Return an anchor of a checkpoint, the checkpoint's fingerprint, and what the anchor is applied to."""
    with _opened(base) as old:
        delta, target = with_target(
            between(
                old,
                now,
                base_id=base.id if base else None,
                values=coding.values,
                level=coding.level if base else "fast",
                standalone=coding.standalone,
                progress=progress,
            )
        )
    named = AnchorBase(base.id, delta.base_fingerprint) if base else None
    return delta, target, named


@contextmanager
def _opened(base: OutsideBase | None) -> Iterator[Checkpoint | None]:
    with ExitStack() as context:
        yield (
            context.enter_context(Checkpoint(base.path, include=(), whole=False)) if base else None
        )


def with_target(delta: Delta) -> tuple[Delta, bytes]:
    """Return a delta, and the fingerprint of its target."""
    target = delta.target_fingerprint
    if target is None:
        raise SparseDeltaError("the delta does not know its target")
    return delta, target

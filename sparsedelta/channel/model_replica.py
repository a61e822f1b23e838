"""A model in memory that a follower updates (``channel.following.Replica``)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import IO, TypeAlias

from sparsedelta._typing import AnyPath, Model, Names
from sparsedelta.channel.entry import AnchorBase, Entry
from sparsedelta.channel.following import Onto
from sparsedelta.channel.replicas import base_place, loaded_deltas, stacked, start_of
from sparsedelta.errors import PartlyApplied, StructureMismatch, Uncertain
from sparsedelta.files.checkpoint import Checkpoint
from sparsedelta.format.delta import Delta
from sparsedelta.live.chain import find_unwritten, prepare_chain
from sparsedelta.live.patch import Patch, Writer
from sparsedelta.live.places import find_places
from sparsedelta.live.ranks import Alone, Group
from sparsedelta.live.rwlock import SharedLock
from sparsedelta.live.sides import held_checkpoint
from sparsedelta.live.whole import write_whole
from sparsedelta.ops.base_check import open_base
from sparsedelta.ops.identity import checkpoint_fingerprint

Source: TypeAlias = tuple[Delta, Checkpoint]


class ModelReplica:
    """A model in memory, changed in place while no thread reads it.

    Args:
        model: a module or a state dict.
        base: the checkpoint that anchors are applied to, if they are applied to one.
        names: see ``Delta.apply_``.
        group: the processes that hold the model together.
    """

    has_other_files = False

    def __init__(
        self,
        model: Model,
        *,
        base: AnyPath | None = None,
        names: Names = None,
        group: Group | None = None,
    ) -> None:
        self.lock = SharedLock()
        self._model = model
        self._base = base
        self._names = names
        self._group = group or Alone()
        self._writer = Writer(group=self._group)
        self._fingerprint: bytes | None = None  # of what is held that is no version

    def fingerprint(self) -> bytes | None:
        """Return the fingerprint of the model; None if the way it is saved is unknown."""
        with self.lock.writing():
            self._writer.restore()
        with self.lock.reading():
            self._fingerprint = self._read_fingerprint()
        return self._fingerprint

    def _read_fingerprint(self) -> bytes | None:
        try:
            with held_checkpoint(self._model) as now:
                return checkpoint_fingerprint(now)
        except StructureMismatch:
            return None

    def is_present(self) -> bool:
        """Return True: a model cannot be deleted."""
        return True

    def hints(self) -> Sequence[tuple[int, bytes]]:
        """Return nothing: a model does not outlive its process."""
        return ()

    @property
    def last(self) -> int:
        """0: a model does not outlive its process."""
        return 0

    def has_base(self, base: AnchorBase) -> bool:
        """Return whether the model is the base, or the base was given."""
        return self._base is not None or self._is_base(base)

    def move(
        self,
        files: Sequence[IO[bytes]],
        onto: Onto,
        base: AnchorBase | None,
        held: Entry | None,
        to: Entry,
        becomes: Callable[[Entry | None], None],
    ) -> None:
        """Change the model to a version: by one write of all changed elements, or of all tensors."""
        with ExitStack() as context:
            deltas = loaded_deltas(context, files, start_of(onto, base, held), to)
            if onto == "held" or (base and self._is_base(base)):
                self.patch(deltas, to, becomes)
            else:
                place = context.enter_context(base_place(base, self._base))
                one, *later = (
                    deltas if self._in_place(deltas[1:]) else [stacked(context, deltas, place)]
                )
                checkpoint = context.enter_context(open_base(place, one))
                self.rewrite((one, checkpoint), later, to, becomes)
        self._fingerprint = None

    def patch(
        self, deltas: Sequence[Delta], to: Entry, becomes: Callable[[Entry | None], None]
    ) -> None:
        """Change the model by one write of all changed elements; see ``move``."""
        self._write(self._prepared(deltas), to, becomes)

    def rewrite(
        self,
        source: Source | None,
        later: Sequence[Delta],
        to: Entry,
        becomes: Callable[[Entry | None], None],
    ) -> None:
        """Write all tensors, then the changed elements of later deltas; see ``move``."""
        with self.lock.writing():
            becomes(None)  # a model that was written in part is no version
            self._write_all(source)
            if later:
                self._writer.write(self._prepared(later))
            becomes(to)

    def _prepared(self, deltas: Sequence[Delta]) -> Sequence[Patch]:
        return prepare_chain(deltas, self._model, names=self._names, group=self._group)

    def _write_all(self, source: Source | None) -> None:
        if source:
            write_whole(*source, self._model, names=self._names)

    def _in_place(self, deltas: Sequence[Delta]) -> bool:
        """Return whether deltas change elements only, so that they need not be stacked on an anchor, which is slow."""
        try:
            for delta in deltas:
                find_places(delta, self._model, self._names)
        except StructureMismatch:
            return False
        return True

    def _is_base(self, base: AnchorBase) -> bool:
        return self._fingerprint == base.fingerprint

    def _write(
        self, patches: Sequence[Patch], to: Entry, becomes: Callable[[Entry | None], None]
    ) -> None:
        """Write patches, and read the values back while others may read too."""
        try:
            with self.lock.writing():
                becomes(None)  # a model that was written in part is no version
                self._writer.write(patches)
                becomes(to)
            with self.lock.reading():
                unwritten = self._find_unwritten(patches)
                if unwritten:
                    becomes(None)
            if unwritten:
                with self.lock.writing():
                    self._writer.write([patch.reversed() for patch in patches])
        except PartlyApplied as error:
            raise Uncertain(f"{error}; sync again does so") from error
        if unwritten:
            raise Uncertain(
                f"tensor {unwritten!r} of the model does not hold the values that were written"
                " to it, so the memory is faulty or something else writes there; the old values were written"
                " back, and the version that the model holds is unknown; sync again to find out or rebuild it"
            )

    def _find_unwritten(self, patches: Sequence[Patch]) -> str | None:
        group = self._group
        found = group.together(lambda: group.gathered(find_unwritten(patches)))
        return next(filter(None, found), None)

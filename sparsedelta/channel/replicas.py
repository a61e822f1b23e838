"""What a follower updates: a model in memory or a checkpoint on disk (``channel.following.Replica``)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

from sparsedelta._typing import AnyPath, Model, Names
from sparsedelta.channel.entry import AnchorBase, Entry
from sparsedelta.channel.following import Onto
from sparsedelta.errors import (
    CheckpointError,
    Corrupt,
    FormatError,
    PartlyApplied,
    StructureMismatch,
    Uncertain,
)
from sparsedelta.files.checkpoint import Checkpoint
from sparsedelta.format.delta import Delta, load
from sparsedelta.format.strict_json import compact_json, hex_bytes, integer, items, parse_json
from sparsedelta.fs import check_checkpoint_folder, check_no_folder, staged_output, temporary_folder
from sparsedelta.live.chain import find_unwritten, prepare_chain
from sparsedelta.live.patch import Patch, Writer
from sparsedelta.live.ranks import check_undivided
from sparsedelta.live.rwlock import SharedLock
from sparsedelta.live.sides import held_checkpoint
from sparsedelta.live.slots import find_places
from sparsedelta.live.whole import write_whole
from sparsedelta.ops.apply import write_target
from sparsedelta.ops.base_check import open_base
from sparsedelta.ops.identity import checkpoint_fingerprint
from sparsedelta.ops.stack import stack
from sparsedelta.progress import Progress

_HELD_SUFFIX = ".sparsedelta-held.json"
_MAX_HELD_BYTES = 1 << 16


class ModelReplica:
    """A model in memory, changed in place while no thread reads it.

    Args:
        model: a module or a state dict.
        base: the checkpoint that anchors are applied to, if they are applied to one.
        names: see ``Delta.apply_``.
    """

    def __init__(self, model: Model, *, base: AnyPath | None = None, names: Names = None) -> None:
        check_undivided(
            model, "a follower", "follow to a folder, or load versions and apply them on all ranks"
        )
        self.lock = SharedLock()
        self._model = model
        self._base = base
        self._names = names
        self._writer = Writer()
        self._fingerprint: bytes | None = None  # of what is held that is no version

    def fingerprint(self) -> bytes | None:
        """Return the fingerprint of the model; None if the way it is saved is unknown."""
        with self.lock.writing():
            self._writer.restore()
        with self.lock.reading():
            try:
                with held_checkpoint(self._model) as now:
                    self._fingerprint = checkpoint_fingerprint(now)
            except StructureMismatch:
                self._fingerprint = None
        return self._fingerprint

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
            deltas = _loaded(context, files, _start(onto, base, held), to)
            if onto == "held" or (base and self._is_base(base)):
                patches = prepare_chain(deltas, self._model, names=self._names)
                self._write(patches, to, becomes)
            else:
                place = context.enter_context(_base_place(base, self._base))
                one, *later = (
                    deltas if self._in_place(deltas[1:]) else [_stack(context, deltas, place)]
                )
                checkpoint = context.enter_context(open_base(place, one))
                with self.lock.writing():
                    becomes(None)  # a model that was written in part is no version
                    write_whole(one, checkpoint, self._model, names=self._names)
                    if later:
                        self._writer.write(prepare_chain(later, self._model, names=self._names))
                    becomes(to)
        self._fingerprint = None

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
                unwritten = find_unwritten(patches)
                if unwritten:
                    becomes(None)
            if unwritten:
                with self.lock.writing():
                    self._writer.write([patch.reversed() for patch in patches])
        except PartlyApplied as error:
            raise Uncertain(f"{error}; sync again does so") from error
        if unwritten:
            raise Uncertain(
                f"tensor {unwritten.place.row.name!r} of the model does not hold the values that were written"
                " to it, so the memory is faulty or something else writes there; the old values were written"
                " back, and the version that the model holds is unknown; sync again to find out or rebuild it"
            )


class DiskReplica:
    """A checkpoint on disk, replaced in one step.

    A file beside it lists the versions that it may be. The list is only a hint: the digests of the tensors decide.

    Args:
        out: the folder or file.
        base: the checkpoint that anchors are applied to, if they are applied to one.
        overwrite: replace ``out`` even if it is not a version of the channel.
        progress: receives the number of bytes written.
    """

    def __init__(
        self,
        out: AnyPath,
        *,
        base: AnyPath | None = None,
        overwrite: bool = False,
        progress: Progress | None = None,
    ) -> None:
        self._out = Path(os.path.abspath(out))
        self._hints_path = self._out.with_name(f".{self._out.name[:200]}{_HELD_SUFFIX}")
        self._base = base
        self._overwrite = overwrite
        self._progress = progress

    def fingerprint(self) -> bytes | None:
        """Return the fingerprint of the checkpoint on disk; None if there is none."""
        try:
            with Checkpoint(self._out, whole=False, complete=False) as checkpoint:
                return checkpoint_fingerprint(checkpoint) if checkpoint.weight_files else None
        except (CheckpointError, FileNotFoundError):
            return None

    def hints(self) -> Sequence[tuple[int, bytes]]:
        """Return the versions in the file beside the checkpoint."""
        try:
            with open(self._hints_path, "rb") as file:
                return _parse_hints(file.read(_MAX_HELD_BYTES))
        except (FileNotFoundError, FormatError):
            return ()

    @property
    def last(self) -> int:
        """The latest version in the file beside the checkpoint; 0 if anything may be replaced."""
        return 0 if self._overwrite else max((version for version, _ in self.hints()), default=0)

    def has_base(self, base: AnchorBase) -> bool:
        """Return whether the base was given."""
        return self._base is not None

    def move(
        self,
        files: Sequence[IO[bytes]],
        onto: Onto,
        base: AnchorBase | None,
        held: Entry | None,
        to: Entry,
        becomes: Callable[[Entry | None], None],
    ) -> None:
        """Become a version: it is written beside what is there, and takes its place."""
        is_ours = held is not None or bool(self.hints()) or self._overwrite
        with ExitStack() as context:
            deltas = _loaded(context, files, _start(onto, base, held), to)
            place = self._out
            if onto == "anchor":
                place = context.enter_context(_base_place(base, self._base))
            check = check_checkpoint_folder if deltas[-1].target.is_folder else check_no_folder
            check(self._out)
            staged = context.enter_context(staged_output(self._out, overwrite=is_ours))
            if onto == "anchor" and len(deltas) > 1:
                # To stack on an anchor is to encode all tensors again, which takes longer than to write them.
                anchor, *deltas = deltas
                self._write(anchor, place, staged.with_name("anchor"))
                place = staged.with_name("anchor")
            self._write(_stack(context, deltas, place), place, staged)
            self._note([to, held] if held else [to])

    def _write(self, delta: Delta, base: Path, out: Path) -> None:
        with open_base(base, delta) as checkpoint:
            write_target(checkpoint, delta, out, check="full", exclude=(), progress=self._progress)

    def _note(self, entries: Sequence[Entry]) -> None:
        """Write down what may be there from now on."""
        content = compact_json([[entry.version, entry.digest.hex()] for entry in entries])
        with (
            staged_output(self._hints_path, overwrite=True) as staged,
            open(staged, "xb") as file,
        ):
            file.write(content)
            file.flush()
            os.fsync(file.fileno())


@contextmanager
def _base_place(base: AnchorBase | None, given: AnyPath | None) -> Iterator[Path]:
    """Yield where the base of an anchor is: an empty folder for none."""
    if base is not None and given is not None:
        yield Path(given)
        return
    with temporary_folder("empty") as folder:
        yield folder


def _loaded(
    context: ExitStack, files: Sequence[IO[bytes]], start: bytes | None, to: Entry
) -> list[Delta]:
    """Return the deltas in files, which are closed with the context.

    Args:
        context: of the deltas.
        files: of deltas, each on the target of the one before it.
        start: fingerprint of what the first is on; None: of nothing.
        to: the version that the last makes.

    Raises:
        Corrupt: a delta is on something else, or the last makes something else.
    """
    deltas = [context.enter_context(load(file)) for file in files]
    there = start
    for delta in deltas:
        # A delta whose target has no counterpart of some tensors does not know the others of its base.
        if there is not None and not delta.base.n_unused and delta.base_fingerprint != there:
            raise _other_error("a delta is on a base", there, delta.base_fingerprint)
        there = delta.target_fingerprint
    if there is not None and there != to.target:
        raise _other_error("the last delta has a target", to.target, there)
    return deltas


def _start(onto: Onto, base: AnchorBase | None, held: Entry | None) -> bytes | None:
    """Return the fingerprint of what the first delta is on, None for an anchor on nothing."""
    if onto == "held":
        return held.target if held else None
    return base.fingerprint if base else None


def _other_error(what: str, expected: bytes, found: bytes) -> Corrupt:
    return Corrupt(
        f"{what} with fingerprint {found.hex()[:12]}…, expected {expected.hex()[:12]}…; nothing was changed",
        expected=expected.hex(),
        found=found.hex(),
    )


def _stack(context: ExitStack, deltas: Sequence[Delta], base: Path) -> Delta:
    """Return deltas on one another as one, which is closed with the context."""
    return deltas[0] if len(deltas) == 1 else context.enter_context(stack(*deltas, base=base))


def _parse_hints(raw: bytes) -> list[tuple[int, bytes]]:
    what = "the file of what is held"
    found = []
    for item in items(parse_json(raw, what), what, 2):
        version, digest = items(item, what, 2)
        found.append((integer(version, what), hex_bytes(digest, what, 32)))
    return found

"""A checkpoint on disk that a follower updates (``channel.following.Replica``), and what is common to all that it updates."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

from sparsedelta._typing import AnyPath
from sparsedelta.channel.entry import AnchorBase, Entry
from sparsedelta.channel.following import Onto
from sparsedelta.channel.placed import Placed, parse_placed, placed, placed_json
from sparsedelta.errors import BadVersion, CheckpointError, Corrupt, FormatError
from sparsedelta.files.checkpoint import Checkpoint
from sparsedelta.format.delta import Delta, load
from sparsedelta.fs import (
    check_checkpoint_folder,
    check_no_folder,
    check_no_slash,
    staged_output,
    temporary_folder,
)
from sparsedelta.ops.apply import write_target
from sparsedelta.ops.base_check import open_base
from sparsedelta.ops.identity import checkpoint_fingerprint
from sparsedelta.ops.stack import stack_chain
from sparsedelta.progress import Progress

_log = logging.getLogger(__name__)
_HELD_SUFFIX = ".sparsedelta-held.json"
_MAX_HELD_BYTES = 1 << 22


class DiskReplica:
    """A checkpoint on disk, replaced in one step.

    A file beside it lists the versions that it may be, and their files. Which version it is, the digests of the tensors
    decide; whether the follower has written it and may replace it if it is damaged, and whether its other files are
    whole, the list.

    Args:
        out: the folder or file.
        base: the checkpoint that anchors are applied to, if they are applied to one.
        overwrite: replace ``out`` even if no follower has written it.
        progress: receives the number of bytes written.
    """

    has_other_files = True

    def __init__(
        self,
        out: AnyPath,
        *,
        base: AnyPath | None = None,
        overwrite: bool = False,
        progress: Progress | None = None,
    ) -> None:
        self._given = out
        self._out = Path(os.path.abspath(out))
        self._hints_path = self._out.with_name(f".{self._out.name[:200]}{_HELD_SUFFIX}")
        self._base = base
        self._overwrite = overwrite
        self._progress = progress
        self._damaged: str | None = None  # a file that is not of weights

    def fingerprint(self) -> bytes | None:
        """Return the fingerprint of the checkpoint on disk; None if there is none, or a file of it is damaged."""
        here = self._ours()
        self._damaged = here.damage(self._out) if here else None
        if self._damaged:
            return None
        try:
            with Checkpoint(self._out, whole=False, complete=False) as checkpoint:
                return checkpoint_fingerprint(checkpoint) if checkpoint.weight_files else None
        except (CheckpointError, FileNotFoundError):
            return None

    def is_present(self) -> bool:
        """Return whether there is a file or folder."""
        return self._out.exists()

    def hints(self) -> Sequence[tuple[int, bytes]]:
        """Return the versions in the file beside the checkpoint whose files are there, first those that the follower has written."""
        there = [one for one in self._listed() if one.damage(self._out) is None]
        there.sort(key=lambda one: not one.is_in(self._out))
        return [(one.version, one.digest) for one in there]

    @property
    def last(self) -> int:
        """The version that was written last, as the file beside the checkpoint says; 0 if anything may be replaced."""
        if self._overwrite:
            return 0
        ours = self._ours()
        return ours.version if ours else max((one.version for one in self._listed()), default=0)

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
        is_ours = self._ours() is not None
        with ExitStack() as context:
            deltas = loaded_deltas(context, files, start_of(onto, base, held), to)
            place = self._out
            if onto == "anchor":
                place = context.enter_context(base_place(base, self._base))
            check = check_checkpoint_folder if deltas[-1].target.is_folder else check_no_folder
            if not is_ours:
                check(self._out)
            if held is not None or (is_ours and not self._overwrite):
                self._check_kind(to, is_folder=deltas[-1].target.is_folder)
            if not deltas[-1].target.is_folder:
                check_no_slash(self._given, "model.safetensors")
            if is_ours and held is None:
                _log.warning(
                    "%s in '%s' is missing or changed, or of another channel; all files are written again",
                    repr(self._damaged) if self._damaged else "a weight file", self._out,
                )  # fmt: skip
            # Another follower of this place may have been quicker, and this one may have overwritten its list.
            is_followed = held is not None and bool(self._listed())
            may_replace = is_ours or is_followed or self._overwrite
            staged = context.enter_context(staged_output(self._out, overwrite=may_replace))
            if onto == "anchor" and len(deltas) > 1:
                # To stack on an anchor is to encode all tensors again, which takes longer than to write them.
                anchor, *deltas = deltas
                self._write(anchor, place, staged.with_name("anchor"))
                place = staged.with_name("anchor")
            self._write(stacked(context, deltas, place), place, staged)
            before = [one for one in self._listed() if one.is_in(self._out)]
            self._note([placed(to, staged), *before])

    def _check_kind(self, to: Entry, *, is_folder: bool) -> None:
        """Raise BadVersion if a folder would become one file, or the reverse."""
        if self._out.exists() and self._out.is_dir() != is_folder:
            held, new = ("a folder", "one file") if self._out.is_dir() else ("one file", "a folder")
            raise BadVersion(
                f"version {to.version} is {new}, and '{self._out}' is {held}; nothing was changed; all versions of a channel"
                " must be of one kind: publish in a new channel, or follow this one to a new place"
            )

    def _write(self, delta: Delta, base: Path, out: Path) -> None:
        with open_base(base, delta) as checkpoint:
            write_target(checkpoint, delta, out, check="full", exclude=(), progress=self._progress)

    def _listed(self) -> list[Placed]:
        try:
            with open(self._hints_path, "rb") as file:
                return parse_placed(file.read(_MAX_HELD_BYTES))
        except (FileNotFoundError, FormatError):
            return []

    def _ours(self) -> Placed | None:
        """Return what the follower has written and is there, perhaps damaged."""
        return next((one for one in self._listed() if one.is_in(self._out)), None)

    def _note(self, versions: Sequence[Placed]) -> None:
        """Write down what may be there from now on."""
        with (
            staged_output(self._hints_path, overwrite=True) as staged,
            open(staged, "xb") as file,
        ):
            file.write(placed_json(versions))
            file.flush()
            os.fsync(file.fileno())


@contextmanager
def base_place(base: AnchorBase | None, given: AnyPath | None) -> Iterator[Path]:
    """Yield where the base of an anchor is: an empty folder for none."""
    if base is not None and given is not None:
        yield Path(given)
        return
    with temporary_folder("empty") as folder:
        yield folder


def loaded_deltas(
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


def start_of(onto: Onto, base: AnchorBase | None, held: Entry | None) -> bytes | None:
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


def stacked(context: ExitStack, deltas: Sequence[Delta], base: Path) -> Delta:
    """Return deltas on one another as one, which is closed with the context."""
    return deltas[0] if len(deltas) == 1 else context.enter_context(stack_chain(deltas, base))

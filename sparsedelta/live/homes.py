"""``Homes``: what was published of tensors that lie on several ranks, and deltas of all of them.

Each rank compares and encodes the tensors that it is the home of. Rank 0 gets the coded bytes and puts them together. So it
holds no more of the model than the others.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from sparsedelta._typing import AnyPath
from sparsedelta.errors import SparseDeltaError, StructureMismatch
from sparsedelta.files.checkpoint import Checkpoint
from sparsedelta.files.shards import roles
from sparsedelta.files.side_files import digest_file
from sparsedelta.files.unread import UNREAD_WEIGHTS
from sparsedelta.format.delta import Delta
from sparsedelta.format.digests import fingerprint
from sparsedelta.format.records import Base, Row, TensorSpec
from sparsedelta.format.spool import new_payload
from sparsedelta.live.capture import Capture
from sparsedelta.live.ranks import Ranks
from sparsedelta.live.sides import FILE_NAME, laid_out, weight_file
from sparsedelta.live.snapshot import Snapshot
from sparsedelta.live.wire import RankFailed, RankLost, Wire
from sparsedelta.ops.diff import between, describe_files

if TYPE_CHECKING:
    import torch

_log = logging.getLogger(__name__)
_BLOCK_BYTES = 16 << 20
_IDLE = timedelta(days=365)  # between two versions
Command: TypeAlias = Literal["capture", "change", "anchor", "advance", "send", "end"]


class _Layout(Checkpoint):
    """The files that a state would be saved to, or those of a folder; no tensor can be read."""

    def __init__(self, specs: Mapping[str, TensorSpec], folder: AnyPath | None) -> None:
        """Describe the files.

        Raises:
            StructureMismatch: the folder has other tensors.
        """
        if folder is not None:
            super().__init__(folder, exclude=UNREAD_WEIGHTS, include=())
            found = {tensor.name: tensor.spec for tensor in self.tensors.values()}
            for name in found.keys() | specs.keys():
                one, other = found.get(name), specs.get(name)
                if one is None or other is None or not one.same_layout(other):
                    self.close()
                    raise StructureMismatch(
                        f"tensor {name!r} is not the same in '{folder}' and in the model, or only in one of them;"
                        " give a checkpoint of this model, or the model in host memory (whole)",
                        tensor=name,
                    )
            return
        self.path, self.is_folder = Path("state dict in memory"), False
        self._fds = []
        file = weight_file(FILE_NAME, None, laid_out(specs))
        self.weight_files = (file,)
        self.tensors = {tensor.key: tensor for tensor in file.tensors}
        self.roles = roles([FILE_NAME], {})
        self.side_files = {}
        self.empty_folders = self.left_out = ()


class Homes:
    """Tensors on all ranks, and a snapshot of each on its home.

    All ranks make one. Then rank 0 calls the methods, also from another thread, and a thread of each other rank does
    its share. These threads exchange over a process group of their own, so that the ranks can train meanwhile.

    Attributes:
        fingerprint: of what is published, on rank 0 when it was made.
        layout: its files and tensors, without their bytes; None on other ranks than 0.
    """

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor],
        *,
        folder: AnyPath | None = None,
        carries_side_files: bool = True,
    ) -> None:
        """Copy the tensors and compute their digests.

        Args:
            tensors: those that this rank is the home of, in host memory; they are updated in place.
            folder: a checkpoint with the names, dtypes and shapes of all tensors, which rank 0 reads; versions then have
                its files.
            carries_side_files: the first delta carries the other files of the folder. If false, it is on these files.

        Raises:
            StructureMismatch: the folder has other tensors.
        """
        import torch.distributed as dist

        group = Ranks()
        self._snapshot = group.together(lambda: Snapshot(tensors))
        self._capture: Capture | None = None
        self._made: Delta | None = None
        self._change: Delta | None = None
        self._side_files: dict[str, tuple[int, bytes]] = {}
        self._wire = Wire(dist.new_group(backend="gloo", timeout=_IDLE))
        self._rank = self._wire.rank
        found = self._wire.gathered(self._snapshot.specs)
        specs = {name: spec for one in found for name, spec in one.items()}
        self.fingerprint = fingerprint(specs.items())

        def described() -> _Layout | None:
            if self._rank:
                return None
            layout = _Layout(specs, folder)
            if not carries_side_files:
                self._side_files = {at: digest_file(f) for at, f in layout.side_files.items()}
            return layout

        self.layout = group.together(described)
        self._thread: threading.Thread | None = None
        if self._rank:
            self._thread = threading.Thread(
                target=self._serve, name="sparsedelta rank", daemon=True
            )
            self._thread.start()

    def capture(self) -> None:
        """Copy what has changed in the tensors since the snapshots; the tensors may change afterwards."""
        self._all_do("capture")

    def change(self, **options: Any) -> Delta:
        """Return the delta from the snapshots to what was captured; see ``Snapshot.diff``."""
        return self._joined("change", options, self._side_files)

    def anchor(self) -> Delta:
        """Return a delta on nothing with all that was captured."""
        return self._joined("anchor", {}, {})

    def advance(self, delta: Delta) -> None:
        """Move the snapshots to the target of the delta that ``change`` has returned last."""
        self._all_do("advance")
        self._side_files = {f.path: (f.n_bytes, f.digest) for f in delta.target.side_files}

    def close(self) -> None:
        """Let the threads of the other ranks end; called on all ranks."""
        if self._rank == 0:
            self._all_do("end")
        if self._thread:
            self._thread.join()
        if self.layout:
            self.layout.close()

    def _serve(self) -> None:
        """Do what rank 0 says until it ends."""
        command: Command = "send"
        options: Mapping[str, Any] = {}
        try:
            while command != "end":
                command, options = self._wire.from_first((command, options))
                if command == "send":
                    if options["rank"] == self._rank:
                        for block in self._sent():
                            self._wire.send(block, 0)
                    continue
                self._wire.gathered_on(0, self._answer(command, options))
        except RankLost as error:
            _log.info("rank 0 is gone: %s", error)

    def _answer(self, command: Command, options: Mapping[str, Any]) -> Any:
        """Return the rows of a delta, None, or the error of this rank."""
        try:
            return self._do(command, options)
        except Exception as error:
            return RankFailed(f"rank {self._rank} has failed: {error}")

    def _do(self, command: Command, options: Mapping[str, Any]) -> Sequence[Row] | None:
        if command == "capture":
            self._capture = self._snapshot.capture()
        elif command == "advance" and self._change:
            self._snapshot.advance(self._change)
        elif command == "change" and self._capture:
            if self._change:
                self._change.close()
            self._made = self._change = self._capture.diff(**options)
        elif command == "anchor" and self._capture:
            if self._made and self._made is not self._change:
                self._made.close()
            self._made = between(None, self._capture, level="fast")
        else:
            return None
        return list(self._made.tensors) if self._made and command in ("change", "anchor") else None

    def _sent(self) -> Iterator[bytes | SparseDeltaError | None]:
        """Yield blocks, then None; or the error of this rank."""
        try:
            yield from self._blocks()
            yield None
        except OSError as error:
            yield RankFailed(f"rank {self._rank} has failed: {error}")

    def _blocks(self) -> Iterator[bytes]:
        """Yield the coded bytes of the delta that was made last, in the order of its rows."""
        made, held = self._made, bytearray()
        if made is None:
            raise AssertionError
        for row in made.tensors:
            for chunk in row.chunks:
                held += made.payload.read(chunk.offset, chunk.stored_bytes)
                if len(held) >= _BLOCK_BYTES:
                    yield bytes(held)
                    held.clear()
        yield bytes(held)

    def _all_do(self, command: Command, options: Mapping[str, Any] | None = None) -> list[Any]:
        """Let all ranks do something; return their answers.

        Raises:
            SparseDeltaError: a rank has failed, or the connection to it was lost.
        """
        self._wire.from_first((command, options or {}))
        answers = self._wire.gathered_on(0, self._answer(command, options or {}))
        for answer in answers:
            if isinstance(answer, SparseDeltaError):
                raise answer
        return answers

    def _joined(
        self,
        command: Command,
        options: Mapping[str, Any],
        published: Mapping[str, tuple[int, bytes]],
    ) -> Delta:
        """Return the deltas of all ranks as one."""
        layout = self.layout
        if layout is None:
            raise AssertionError
        parts = self._all_do(command, options)
        with new_payload(None) as payload:
            files = describe_files(layout, published.get, payload)
            rows: dict[str, Row] = {}
            for rank, part in enumerate(parts):
                for row in _moved(part, payload.add_streams(b"")):
                    rows[row.name] = row
                failure: OSError | None = None
                for block in self._received(rank):  # all of them, also after a failure
                    try:
                        if failure is None:
                            payload.add_streams(block)
                    except OSError as error:
                        failure = error
                if failure:
                    raise failure
            ordered = [_in_file(rows[name], file) for file, name in layout.tensors]
            return Delta(Base(None), files, tuple(ordered), {}, payload)

    def _received(self, rank: int) -> Iterator[bytes]:
        if rank == 0:
            yield from self._blocks()
            return
        command: Command = "send"
        self._wire.from_first((command, {"rank": rank}))
        while (block := self._wire.receive(rank)) is not None:
            if isinstance(block, SparseDeltaError):
                raise block
            yield block


def _moved(rows: Sequence[Row], offset: int) -> Iterator[Row]:
    """Yield rows whose chunks lie end to end in another payload."""
    for row in rows:
        chunks = []
        for chunk in row.chunks:
            chunks.append(chunk.at(offset))
            offset += chunk.stored_bytes
        yield row.with_chunks(tuple(chunks))


def _in_file(row: Row, file: str) -> Row:
    """Return a row as that of a file."""
    return replace(row, file=file, base=row.base and replace(row.base, file=file))

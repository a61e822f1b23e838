"""A delta in memory: what its manifest says, and where its coded bytes are."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, TypeAlias

from sparsedelta._typing import JSON, AnyPath, Model, ModelCheck, Names
from sparsedelta.errors import LimitExceeded
from sparsedelta.format.container import FilePayload, container_blocks, write_container
from sparsedelta.format.digests import base_tensors, fingerprint
from sparsedelta.format.manifest import Manifest
from sparsedelta.format.records import Base, Payload, Row, Target
from sparsedelta.fs import check_no_folder
from sparsedelta.stores.base import ByteSource
from sparsedelta.stores.local import OpenFile
from sparsedelta.stores.stream import Seekable, Stream

_OUTPUT_EXTRA, _OUTPUT_RATIO = 64 << 20, 1024


@dataclass(frozen=True, slots=True, repr=False)
class Delta:
    """The transition from a base to a target.

    Attributes:
        base: hints about the base.
        target: the target's files.
        tensors: the target's tensors, in the order of its files and their data, and how each is made.
        info: how the target was made; free JSON.
        payload: the coded bytes.
    """

    base: Base
    target: Target
    tensors: tuple[Row, ...]
    info: Mapping[str, JSON]
    payload: Payload

    def __repr__(self) -> str:
        base = self.base.id or self.base_fingerprint.hex()[:12]
        return f"<Delta of {base}: {self.nnz:,} of {self.numel:,} elements changed>"

    @property
    def nnz(self) -> int:
        """Changed elements over all tensors."""
        return sum(row.nnz for row in self.tensors)

    @property
    def numel(self) -> int:
        """Elements of the target over all tensors."""
        return sum(row.target.n_elements for row in self.tensors)

    @property
    def base_fingerprint(self) -> bytes:
        """Fingerprint of the base tensors that the target is made from."""
        return fingerprint((name, spec) for (_, name), spec in base_tensors(self.tensors).items())

    @property
    def target_fingerprint(self) -> bytes | None:
        """Fingerprint of the target; None if the digest of a tensor is not known."""
        if any(row.target.digest is None for row in self.tensors):
            return None
        return fingerprint((row.name, row.target) for row in self.tensors)

    def check_output(self) -> None:
        """Check that a file makes no more than its size and its base explain (FORMAT §14).

        A file of 1 kB can state a tensor of any size. What is made may be twice the base tensors it is made
        from, 1024 times the file and 64 MiB; what is touched only the last two.

        Raises:
            LimitExceeded: it makes more, and was not loaded with ``any_size``.
        """
        payload = self.payload
        if not isinstance(payload, FilePayload) or payload.any_size:
            return
        allowed = _OUTPUT_EXTRA + _OUTPUT_RATIO * payload.file_bytes
        base = sum(spec.n_bytes for spec in base_tensors(self.tensors).values())
        made = sum(row.target.n_bytes for row in self.tensors)
        made += sum(file.n_bytes for file in self.target.side_files if file.stored)
        touched = sum(row.nnz * row.target.dtype.width for row in self.tensors)
        if made > allowed + 2 * base or touched > allowed:
            raise LimitExceeded(
                f"'{payload.name}' has {payload.file_bytes} bytes and would make {made}, of which it touches"
                f" {touched}: far more than its size explains; if you trust it, allow any size"
                " (any_size=True, --any-size)"
            )

    def save(self, path: AnyPath, *, overwrite: bool = False) -> None:
        """Write the delta as one ``.sd`` file, whole or not at all.

        Raises:
            FileExistsError: ``path`` exists and ``overwrite`` is false.
            IsADirectoryError: it is a folder.
            LimitExceeded: the delta is beyond what the format can hold (FORMAT §11).
        """
        check_no_folder(Path(path))
        write_container(self._manifest(), self.payload, path, overwrite=overwrite)

    def to_bytes(self) -> bytes:
        """Return the bytes of the ``.sd`` file that ``save`` writes.

        Raises:
            FormatError: part of the payload cannot be read.
            LimitExceeded: the delta is beyond what the format can hold (FORMAT §11).
        """
        return b"".join(container_blocks(self._manifest(), self.payload))

    @staticmethod
    def from_bytes(data: bytes, *, any_size: bool = False) -> Delta:
        """Return the delta in the bytes of a ``.sd`` file; see ``load``."""
        return load(BytesIO(data), any_size=any_size)

    def _manifest(self) -> Manifest:
        return Manifest(self.base, self.target, self.tensors, self.info)

    def push_to_hub(self, repo_id: str, **options: Any) -> Any:
        """Put the delta into a repository on the Hub; return the ``PushReport`` of ``sparsedelta.push``.

        Args:
            repo_id: of the repository.
            options: the other arguments of ``sparsedelta.push``.
        """
        from sparsedelta.hub.push import push

        return push(self, repo_id, **options)

    def apply_(self, model: Model, *, verify: ModelCheck = "touched", names: Names = None) -> None:
        """Make the target of the base that a model in memory holds: in place, bit for bit.

        All tensors are checked before the first is written; on any error the model is as it was.

        Args:
            model: a ``torch.nn.Module`` or a state dict, on any device; its tensors are changed.
            verify: ``"touched"`` checks the touched values, ``"full"`` every byte of the tensors
                that the model has of the delta's base, ``"none"`` nothing but dtypes and shapes.
            names: from the name of a tensor in the delta, or from file and name, to its name in the
                model; None as a value: leave this tensor out. What torch.compile, FSDP, DDP and PEFT
                put into names, and one prefix common to all, are found without it, and so are the
                tensors of a transformers model that its checkpoint names, shapes or lays out differently.

        Raises:
            BaseMismatch: a tensor is neither the base's nor the target's.
            AlreadyApplied: the model already is the target.
            PartlyApplied: some tensors are the base's, others the target's.
            StructureMismatch: a changed tensor is missing, has another dtype or shape, or may be that
                of several files; or the delta adds, renames or reshapes tensors.
            FormatError: the delta is damaged or is inconsistent.
            ValueError: the delta lacks what ``verify`` asks for.
        """
        from sparsedelta.live.inplace import apply_

        apply_(self, model, verify=verify, names=names)

    def revert_(self, model: Model, *, verify: ModelCheck = "touched", names: Names = None) -> None:
        """Make the base of the target that a model in memory holds; see ``apply_``.

        Raises:
            ConflictError: the delta holds new values, not differences.
            MismatchError: as for ``apply_``; ``AlreadyApplied``: the model already is the base.
        """
        from sparsedelta.live.inplace import revert_

        revert_(self, model, verify=verify, names=names)

    def applied(
        self, model: Model, *, verify: ModelCheck = "touched", names: Names = None
    ) -> AbstractContextManager[None]:
        """Return a context in which the model is the target; see ``apply_``.

        At its end the touched elements get the bits back that they had, whatever they are then.
        """
        from sparsedelta.live.inplace import applied

        return applied(self, model, verify=verify, names=names)

    def close(self) -> None:
        """Close the file or spool behind the payload; the delta can no longer be applied."""
        self.payload.close()

    def __enter__(self) -> Delta:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def load(path: AnyPath | Seekable, *, any_size: bool = False) -> Delta:
    """Return the delta in a ``.sd`` file: header and manifest read and checked, the payload on demand.

    The file stays open until ``Delta.close``. What is read of the payload is compared with its digest.

    Args:
        path: of the file; or an open binary file with ``read`` and ``seek``, which is not closed.
        any_size: use it even if it makes far more than its size and its base explain, as a hostile file may.

    Raises:
        FormatError: the file is not a delta this version can read.
        OSError: it cannot be opened.
    """
    if isinstance(path, str | os.PathLike):
        return read_delta(OpenFile(path), any_size=any_size)
    if isinstance(path, bytes | bytearray | memoryview):
        raise TypeError("bytes are given, expected a path or an open file; use Delta.from_bytes")
    return read_delta(Stream(path), any_size=any_size)


AnyDelta: TypeAlias = AnyPath | Delta


def opened(delta: AnyDelta, *, any_size: bool = False) -> AbstractContextManager[Delta]:
    """Return a context with a delta: one that is given, which stays open after it, or one loaded for it."""
    return nullcontext(delta) if isinstance(delta, Delta) else load(delta, any_size=any_size)


def read_delta(source: ByteSource, *, any_size: bool = False) -> Delta:
    """Return the delta whose file has these bytes; see ``load``. The source is closed with it."""
    payload = FilePayload(source, any_size=any_size)
    try:
        manifest = payload.open()
    except BaseException:
        payload.close()
        raise
    return Delta(manifest.base, manifest.target, manifest.tensors, manifest.info, payload)

"""An open delta: the parsed manifest, and access to the payload."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from io import BytesIO
from typing import Any, TypeAlias

from sparsedelta._typing import JSON, AnyPath, Model, ModelCheck, Names
from sparsedelta.errors import FormatError, LimitExceeded
from sparsedelta.format.columns import columns_of, total
from sparsedelta.format.container import FilePayload, container_blocks, write_container
from sparsedelta.format.digests import base_fingerprint, base_tensors, target_fingerprint
from sparsedelta.format.manifest import Manifest
from sparsedelta.format.records import Base, Payload, Row, Target
from sparsedelta.fs import check_no_folder, check_no_slash
from sparsedelta.stores.base import ByteSource
from sparsedelta.stores.local import OpenFile
from sparsedelta.stores.stream import Seekable, Stream

_OUTPUT_EXTRA, _OUTPUT_RATIO = 64 << 20, 1024


@dataclass(frozen=True, slots=True, repr=False)
class Delta:
    """A delta: the difference between a base and a target.

    Attributes:
        base: hints about the base.
        target: the target's files.
        tensors: one row for each tensor of the target, in the order of its files and their data.
        info: how the target was made; free JSON.
        payload: the coded bytes.
    """

    base: Base
    target: Target
    tensors: Sequence[Row]
    info: Mapping[str, JSON]
    payload: Payload

    def __repr__(self) -> str:
        base = self.base.id or self.base_fingerprint.hex()[:12]
        return f"<Delta of {base}: {self.nnz:,} of {self.numel:,} elements changed>"

    @property
    def nnz(self) -> int:
        """Number of touched elements of all tensors."""
        columns = columns_of(self.tensors)
        return total(columns.chunks.nnz) if columns else sum(row.nnz for row in self.tensors)

    @property
    def n_changed(self) -> int:
        """Number of tensors that the delta changes or adds."""
        columns = columns_of(self.tensors)
        if columns:
            return total(~columns.is_copied)
        return sum(not row.is_copied for row in self.tensors)

    @property
    def coded_bytes(self) -> int:
        """Size of all chunks in the payload, in bytes."""
        columns = columns_of(self.tensors)
        return (
            total(columns.chunks.stored)
            if columns
            else sum(row.coded_bytes for row in self.tensors)
        )

    @property
    def numel(self) -> int:
        """Number of elements of all tensors of the target."""
        columns = columns_of(self.tensors)
        if columns:
            return total(columns.n_elements)
        return sum(row.target.n_elements for row in self.tensors)

    @property
    def target_bytes(self) -> int:
        """Size of all tensors of the target in bytes."""
        return self._output_bytes()[0]

    @property
    def base_fingerprint(self) -> bytes:
        """Fingerprint of the base tensors that the target is rebuilt from, 32 bytes."""
        return base_fingerprint(self.tensors)

    @property
    def target_fingerprint(self) -> bytes | None:
        """Fingerprint of the target, 32 bytes; None if the digest of a tensor is not known."""
        return target_fingerprint(self.tensors)

    def check_output(self) -> None:
        """Check that the output is not far larger than the file and the base justify (FORMAT §14).

        A hostile file of 1 kB can declare a tensor of any size. Allowed are:

        - for tensors and carried files: 64 MiB + 1024 × the file's size + 2 × the size of the base
          tensors that the delta refers to;
        - for touched elements: 64 MiB + 1024 × the file's size.

        A delta that was not loaded from a file, or was loaded with ``any_size``, is not limited.

        Raises:
            LimitExceeded: the output is larger.
        """
        payload = self.payload
        if not isinstance(payload, FilePayload) or payload.any_size:
            return
        allowed = _OUTPUT_EXTRA + _OUTPUT_RATIO * payload.file_bytes
        output, touched = self._output_bytes()
        output += sum(file.n_bytes for file in self.target.side_files if file.stored)
        if output <= allowed >= touched:
            return
        base = sum(spec.n_bytes for spec in base_tensors(self.tensors).values())
        if output > allowed + 2 * base or touched > allowed:
            raise LimitExceeded(
                f"'{payload.name}' has {payload.file_bytes} bytes, but its output would have {output} bytes,"
                f" {touched} of them changed; such a file may be an attack; if you trust it, allow any size"
                " (any_size=True, --any-size)"
            )

    def _output_bytes(self) -> tuple[int, int]:
        """Return the size of all tensors of the target, and that of all touched elements."""
        columns = columns_of(self.tensors)
        if columns:
            chunks = columns.chunks
            return total(columns.n_bytes), total(chunks.nnz * chunks.width)
        return (
            sum(row.target.n_bytes for row in self.tensors),
            sum(row.nnz * row.target.dtype.width for row in self.tensors),
        )

    def save(self, path: AnyPath, *, overwrite: bool = False) -> None:
        """Write the delta to one ``.sd`` file. The file appears complete or not at all.

        Raises:
            FileExistsError: ``path`` exists and ``overwrite`` is false.
            IsADirectoryError: ``path`` is a folder, or ends in a slash.
            LimitExceeded: the delta exceeds a limit of the format (FORMAT §11).
        """
        check_no_folder(path)
        check_no_slash(path)
        write_container(self._manifest(), self.payload, path, overwrite=overwrite)

    def to_bytes(self) -> bytes:
        """Return the bytes of the ``.sd`` file that ``save`` writes.

        Raises:
            FormatError: part of the payload cannot be read.
            LimitExceeded: the delta exceeds a limit of the format (FORMAT §11).
        """
        return b"".join(self.blocks())

    def blocks(self) -> Iterator[bytes]:
        """Yield the bytes of the ``.sd`` file that ``save`` writes, in blocks; see ``to_bytes``."""
        return container_blocks(self._manifest(), self.payload)

    @staticmethod
    def from_bytes(data: bytes, *, any_size: bool = False) -> Delta:
        """Return the delta in the bytes of a ``.sd`` file; see ``load``."""
        return load(BytesIO(data), any_size=any_size)

    def _manifest(self) -> Manifest:
        return Manifest(self.base, self.target, self.tensors, self.info)

    def push_to_hub(self, repo_id: str, **options: Any) -> Any:
        """Upload the delta to a repository on the Hub; return the ``PushReport`` of ``sparsedelta.push``.

        Args:
            repo_id: id of the repository.
            options: the other arguments of ``sparsedelta.push``.
        """
        from sparsedelta.hub.push import push

        return push(self, repo_id, **options)

    def apply_(self, model: Model, *, verify: ModelCheck = "touched", names: Names = None) -> None:
        """Change a model in memory from the base to the target, in place and bit for bit.

        All tensors are checked before the first one is written. On any error the model is unchanged.

        If FSDP2 or tensor parallelism divides the model among ranks (DTensor), all ranks of torch.distributed call this
        with the same delta. Each writes what it holds. An error of one rank is raised on all, and no rank is changed.

        Args:
            model: a ``torch.nn.Module`` or a state dict, on any device; its tensors are changed.
            verify: ``"touched"`` checks the touched values, ``"full"`` every byte of the tensors that the
                model holds, and of what they become, ``"none"`` only dtypes and shapes.
            names: maps the name of a tensor in the delta, or a pair of file and name, to its name in the
                model; the value None leaves the tensor out. Not needed for the prefixes that
                torch.compile, FSDP, DDP and PEFT add, for one prefix common to all names, nor for
                tensors that transformers renames, moves or merges when it loads the checkpoint.

        Raises:
            BaseMismatch: a tensor is neither the base's nor the target's.
            AlreadyApplied: the model already is the target.
            PartlyApplied: some tensors are the base's, others the target's.
            StructureMismatch: a changed tensor is missing, has another dtype or shape, or could belong
                to several files; or the delta adds, renames or reshapes tensors.
            ConflictError: ranks have different deltas.
            FormatError: the delta is damaged or inconsistent.
            ValueError: the delta lacks the digests that ``verify`` needs.
            SparseDeltaError: the connection to another rank was lost.
        """
        from sparsedelta.live.inplace import apply_

        apply_(self, model, verify=verify, names=names)

    def revert_(self, model: Model, *, verify: ModelCheck = "touched", names: Names = None) -> None:
        """Change a model in memory from the target back to the base, in place; see ``apply_``.

        Raises:
            ConflictError: the delta holds new values, not differences, so the old values are unknown.
            MismatchError: as for ``apply_``; ``AlreadyApplied`` if the model already is the base.
        """
        from sparsedelta.live.inplace import revert_

        revert_(self, model, verify=verify, names=names)

    def applied(
        self, model: Model, *, verify: ModelCheck = "touched", names: Names = None
    ) -> AbstractContextManager[None]:
        """Return a context in which the model is the target; see ``apply_``.

        At its end the touched elements get their old bits back, even if they were changed meanwhile.
        """
        from sparsedelta.live.inplace import applied

        return applied(self, model, verify=verify, names=names)

    def close(self) -> None:
        """Close the file or spool of the payload; afterwards the payload cannot be read."""
        self.payload.close()

    def __enter__(self) -> Delta:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def load(path: AnyPath | Seekable, *, any_size: bool = False) -> Delta:
    """Return the delta in a ``.sd`` file.

    The header and the manifest are read and checked. The payload is read on demand, and every part
    that is read is compared with its digest. The file stays open until ``Delta.close``.

    Args:
        path: path of the file; or an open binary file with ``read`` and ``seek``, which is not closed.
        any_size: accept a delta whose output is far larger than the file and the base justify; see
            ``Delta.check_output``.

    Raises:
        FormatError: this is not a delta that this release can read; ``BadMagic`` if it is a model or a folder.
        OSError: the file cannot be opened.
    """
    if isinstance(path, str | os.PathLike):
        with _explained(path):
            return _load_file(path, any_size=any_size)
    if isinstance(path, bytes | bytearray | memoryview):
        raise TypeError("path is bytes, expected a path or an open file; use Delta.from_bytes")
    if not (hasattr(path, "read") and hasattr(path, "seek")):
        raise TypeError(
            f"path is of type {type(path).__name__}, expected a path or an open binary file"
        )
    return read_delta(Stream(path), any_size=any_size)


def _load_file(path: AnyPath, *, any_size: bool) -> Delta:
    return read_delta(OpenFile(path), any_size=any_size)


@contextmanager
def _explained(path: AnyPath) -> Iterator[None]:
    """Return a context that says what is at ``path``, if that is no delta of this project."""
    try:
        yield
    except (FormatError, IsADirectoryError) as error:
        from sparsedelta.interop.opening import other_than_delta  # takes a tenth of a second

        other = other_than_delta(path)
        if other is None:
            raise
        raise other from error


AnyDelta: TypeAlias = AnyPath | Delta


def opened(delta: AnyDelta, *, any_size: bool = False) -> AbstractContextManager[Delta]:
    """Return a context that yields a delta: ``delta`` itself, or the one in the file at that path.

    At its end the context closes a delta that it loaded, but not a delta that the caller passed in.
    """
    _check_type(delta)
    return nullcontext(delta) if isinstance(delta, Delta) else load(delta, any_size=any_size)


def _check_type(delta: object) -> None:
    if not isinstance(delta, str | os.PathLike | Delta):
        raise TypeError(
            f"a delta is of type {type(delta).__name__}, expected a path or a loaded delta; give each as an argument"
            " of its own"
        )


@contextmanager
def opened_all(
    deltas: Sequence[AnyDelta],
    base: AnyPath | None,
    *,
    exclude: Sequence[str] = (),
    any_size: bool = False,
) -> Iterator[list[Delta]]:
    """Yield deltas, each loaded, or converted if it has the form of another project; see ``interop.opening``.

    Args:
        deltas: ``.sd`` files, loaded deltas, or files and folders of other forms, in the order of a chain.
        base: the base of the first one; needed for other forms.
        exclude: globs of files of the base to leave out.
        any_size: see ``load``.

    Raises:
        BaseNeeded: a delta has another form, and ``base`` is None.
        FormatError: a delta has no known form, or is damaged.
    """
    for one in deltas:
        _check_type(one)
    with ExitStack() as stack:
        try:
            found = [
                one
                if isinstance(one, Delta)
                else stack.enter_context(_load_file(one, any_size=any_size))
                for one in deltas
            ]
        except (FormatError, IsADirectoryError):
            from sparsedelta.interop.opening import opened_chain  # takes a tenth of a second

            found = stack.enter_context(
                opened_chain(deltas, base, exclude=exclude, any_size=any_size)
            )
        yield found


def read_delta(source: ByteSource, *, any_size: bool = False) -> Delta:
    """Return the delta in ``source``; see ``load``. ``Delta.close`` closes the source."""
    payload = FilePayload(source, any_size=any_size)
    try:
        manifest = payload.open()
    except BaseException:
        payload.close()
        raise
    return Delta(manifest.base, manifest.target, manifest.tensors, manifest.info, payload)

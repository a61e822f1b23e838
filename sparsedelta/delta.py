"""The in-memory model of a delta: what the manifest says, as frozen dataclasses, and where its bytes are."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Protocol, TypeAlias

from sparsedelta.codecs.chunks import Chunk
from sparsedelta.dtypes import DType, tensor_bytes

if TYPE_CHECKING:
    from sparsedelta.hub.push import PushReport
    from sparsedelta.live.names import Model, Names
    from sparsedelta.live.patch import Check
    from sparsedelta.progress import Progress

JSON: TypeAlias = bool | int | float | str | list["JSON"] | dict[str, "JSON"] | None

RESERVED_PREFIX = "sparsedelta:"
MANIFEST_KEY = RESERVED_PREFIX + "manifest"
DIGEST_BYTES = 16
TOUCHED_BYTES = 8


class Payload(Protocol):
    """The coded bytes of a delta, by entry key (FORMAT §2). Safe for reading from several threads."""

    def n_bytes(self, key: str) -> int:
        """Return the size of an entry, 0 if there is none."""

    def read(self, key: str, offset: int, n_bytes: int) -> bytes:
        """Return ``n_bytes`` bytes of an entry from ``offset``."""

    def check(self) -> None:
        """Check the payload as a whole against its digest, once.

        Raises:
            Corrupt: it has changed.
        """

    def close(self) -> None:
        """Release what the payload holds open."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of base or target: dtype, shape, and the first 16 bytes of its digest if known."""

    dtype: DType
    shape: tuple[int, ...]
    digest: bytes | None

    @property
    def n_bytes(self) -> int:
        """Size in bytes."""
        return tensor_bytes(self.dtype, self.shape)

    @property
    def n_elements(self) -> int:
        """Elements as the format counts them (FORMAT §1.1)."""
        return self.n_bytes // self.dtype.width

    def same_layout(self, other: TensorSpec) -> bool:
        """Return whether dtype and shape are equal."""
        return self.dtype is other.dtype and self.shape == other.shape


@dataclass(frozen=True, slots=True)
class Change:
    """How a tensor's target elements come from the base's (FORMAT §4).

    Attributes:
        keep: leading elements taken from the base; the others start as zero bits.
        values: the value encoding.
        touched: short digests of the touched values before and after, if known.
        chunks: the changes, by ascending chunk number.
    """

    keep: int
    values: str
    touched: tuple[bytes, bytes] | None
    chunks: tuple[Chunk, ...]

    @property
    def nnz(self) -> int:
        """Touched elements."""
        return sum(chunk.nnz for chunk in self.chunks)

    @property
    def coded_bytes(self) -> int:
        """Size of the tensor's entry; without one it is 0."""
        return sum(sum(chunk.coded_bytes) for chunk in self.chunks)


@dataclass(frozen=True, slots=True)
class TensorDelta:
    """One row: a tensor in base and target, and its change. No change, same spec: unchanged."""

    name: str
    base: TensorSpec | None
    target: TensorSpec | None
    change: Change | None


@dataclass(frozen=True, slots=True)
class WeightFile:
    """A safetensors file of the target.

    Attributes:
        path: relative to the target folder.
        n_tensors: how many rows, in order, belong to it.
        metadata: the header's ``__metadata__`` in order, for a canonical header.
        stored_header: the header's bytes are in the payload instead of being canonical.
    """

    path: str
    n_tensors: int
    metadata: Mapping[str, str] | None
    stored_header: bool


@dataclass(frozen=True, slots=True)
class SideFile:
    """Any other file of the target: carried in the delta, or the base's file of the same path."""

    path: str
    n_bytes: int
    digest: bytes
    carried: bool


@dataclass(frozen=True, slots=True)
class Base:
    """The base's identity: its fingerprint, and a hint where it may be found."""

    id: str | None
    fingerprint: bytes


@dataclass(frozen=True, slots=True)
class Target:
    """The target: fingerprint if known, and everything about its files but the tensors."""

    fingerprint: bytes | None
    is_folder: bool
    weight_files: tuple[WeightFile, ...]
    side_files: tuple[SideFile, ...]
    empty_folders: tuple[str, ...]


@dataclass(frozen=True, slots=True, repr=False)
class Delta:
    """The transition from a base to a target.

    Attributes:
        base: identity of the base.
        target: the target's files.
        tensors: rows, in the target's order, removed ones last.
        info: how the target was made; free JSON.
        payload: the coded bytes.
    """

    base: Base
    target: Target
    tensors: tuple[TensorDelta, ...]
    info: Mapping[str, JSON]
    payload: Payload

    def __repr__(self) -> str:
        base = self.base.id or self.base.fingerprint.hex()[:12]
        return f"<Delta of {base}: {self.nnz:,} of {self.numel:,} elements changed>"

    @property
    def nnz(self) -> int:
        """Changed elements over all tensors."""
        return sum(row.change.nnz for row in self.tensors if row.change)

    @property
    def numel(self) -> int:
        """Elements of the target over all tensors."""
        return sum(row.target.n_elements for row in self.tensors if row.target)

    def save(self, path: str | PathLike[str], *, overwrite: bool = False) -> None:
        """Write the delta as one ``.sd`` file, whole or not at all.

        Raises:
            FileExistsError: ``path`` exists and ``overwrite`` is false.
            IsADirectoryError: it is a folder.
            LimitExceeded: the delta is beyond what the format can hold (FORMAT §11).
        """
        from sparsedelta.container import write_delta

        write_delta(self, path, overwrite=overwrite)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        base_id: str | None = None,
        base: str | PathLike[str] | None = None,
        subfolder: str | None = None,
        private: bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        commit_message: str | None = None,
        commit_description: str | None = None,
        tag: str | None = None,
        token: str | bool | None = None,
        dry_run: bool = False,
        progress: Progress | None = None,
    ) -> PushReport:
        """Put the delta into a repository on the Hub and return what was done; see ``sparsedelta.push``.

        Raises:
            MismatchError: the base is not the delta's.
            RemoteError: the Hub refuses, or cannot be reached.
            ValueError: an argument is wrong.
        """
        from sparsedelta.hub.push import push

        return push(
            self,
            repo_id,
            base_id=base_id,
            base=base,
            subfolder=subfolder,
            private=private,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message,
            commit_description=commit_description,
            tag=tag,
            token=token,
            dry_run=dry_run,
            progress=progress,
        )

    def apply_(self, model: Model, *, verify: Check = "touched", names: Names = None) -> None:
        """Make the target of the base that a model in memory holds: in place, bit for bit.

        All tensors are checked before the first is written; on any error the model is as it was.

        Args:
            model: a ``torch.nn.Module`` or a state dict, on any device; its tensors are changed.
            verify: ``"touched"`` checks the touched values, ``"full"`` every byte of the tensors
                that the model has of the delta's base, ``"none"`` nothing but dtypes and shapes.
            names: from the name of a tensor in the delta to that in the model, None as a value: leave
                this tensor out. What torch.compile, FSDP, DDP and PEFT put into names, and one
                prefix common to all, are found without it.

        Raises:
            BaseMismatch: a tensor is neither the base's nor the target's.
            AlreadyApplied: the model already is the target.
            PartlyApplied: some tensors are the base's, others the target's.
            StructureMismatch: a changed tensor is missing or has another dtype or shape, or the
                delta adds, removes or reshapes tensors.
            FormatError: the delta is damaged or contradicts itself.
            ValueError: the delta lacks what ``verify`` asks for.
        """
        from sparsedelta.live.patch import apply_

        apply_(self, model, verify=verify, names=names)

    def revert_(self, model: Model, *, verify: Check = "touched", names: Names = None) -> None:
        """Make the base of the target that a model in memory holds; see ``apply_``.

        Raises:
            ConflictError: the delta holds new values, not differences.
            MismatchError: as for ``apply_``; ``AlreadyApplied``: the model already is the base.
        """
        from sparsedelta.live.patch import revert_

        revert_(self, model, verify=verify, names=names)

    def applied(
        self, model: Model, *, verify: Check = "touched", names: Names = None
    ) -> AbstractContextManager[None]:
        """Return a context in which the model is the target; see ``apply_``.

        At its end the touched elements get the bits back that they had, whatever they are then.
        """
        from sparsedelta.live.patch import applied

        return applied(self, model, verify=verify, names=names)

    def close(self) -> None:
        """Close the file or spool behind the payload; the delta can no longer be applied."""
        self.payload.close()

    def __enter__(self) -> Delta:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def tensor_key(name: str) -> str:
    """Return the entry key of a tensor's coded chunks."""
    return f"{RESERVED_PREFIX}tensor/{name}" if name.startswith(RESERVED_PREFIX) else name


def side_file_key(path: str) -> str:
    """Return the entry key of a carried side file."""
    return f"{RESERVED_PREFIX}file/{path}"


def header_key(path: str) -> str:
    """Return the entry key of a weight file's stored header."""
    return f"{RESERVED_PREFIX}header/{path}"


def entry_keys(delta: Delta) -> list[str]:
    """Return the keys of all entries but the manifest, in the order of the file (FORMAT §2)."""
    keys = [side_file_key(f.path) for f in delta.target.side_files if f.carried]
    keys += [header_key(f.path) for f in delta.target.weight_files if f.stored_header]
    keys += [tensor_key(row.name) for row in delta.tensors if row.change and row.change.coded_bytes]
    return keys

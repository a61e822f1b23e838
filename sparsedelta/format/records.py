"""What a manifest says, as frozen dataclasses, and the keys of the entries that hold its bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from sparsedelta.codecs.chunk import Chunk
from sparsedelta.dtypes import DType, tensor_bytes

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
        """ModelCheck the payload as a whole against its digest, once.

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


def tensor_key(name: str) -> str:
    """Return the entry key of a tensor's coded chunks."""
    return f"{RESERVED_PREFIX}tensor/{name}" if name.startswith(RESERVED_PREFIX) else name


def side_file_key(path: str) -> str:
    """Return the entry key of a carried side file."""
    return f"{RESERVED_PREFIX}file/{path}"


def header_key(path: str) -> str:
    """Return the entry key of a weight file's stored header."""
    return f"{RESERVED_PREFIX}header/{path}"


def entry_keys(target: Target, tensors: Sequence[TensorDelta]) -> list[str]:
    """Return the keys of all entries but the manifest, in the order of the file (FORMAT §2)."""
    keys = [side_file_key(f.path) for f in target.side_files if f.carried]
    keys += [header_key(f.path) for f in target.weight_files if f.stored_header]
    keys += [tensor_key(row.name) for row in tensors if row.change and row.change.coded_bytes]
    return keys

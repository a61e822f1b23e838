"""The parts of a manifest (FORMAT §3–§5) as frozen dataclasses. They hold offsets into the payload, not its bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

from sparsedelta.codecs.chunk import Chunk
from sparsedelta.dtypes import DType, tensor_bytes

TensorKey: TypeAlias = tuple[str, str]  # file and name; identifies a tensor within a checkpoint

DIGEST_BYTES = 16  # of a tensor, a header, a coded chunk
FILE_DIGEST_BYTES = 32  # of a side file


class Payload(Protocol):
    """The coded bytes of a delta. Several threads may read at once."""

    def read(self, offset: int, n_bytes: int) -> bytes:
        """Return ``n_bytes`` bytes from ``offset``.

        Raises:
            Truncated: the file has become shorter since it was opened.
            ValueError: the payload is closed.
        """

    def close(self) -> None:
        """Close the file of the payload."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Layout and digest of one tensor of base or target.

    Attributes:
        dtype, shape: its layout, which ``tensor_bytes`` accepts.
        digest: digest of its bytes, 16 bytes; None if it is not known.
    """

    dtype: DType
    shape: tuple[int, ...]
    digest: bytes | None = None
    _n_bytes: int = field(default=-1, init=False, repr=False, compare=False)  # -1: not computed yet

    @property
    def n_bytes(self) -> int:
        """Size in bytes."""
        if self._n_bytes < 0:
            object.__setattr__(self, "_n_bytes", tensor_bytes(self.dtype, self.shape))
        return self._n_bytes

    @property
    def n_elements(self) -> int:
        """Number of elements as the format counts them (FORMAT §1.1)."""
        return self.n_bytes // self.dtype.width

    def with_digest(self, digest: bytes | None) -> TensorSpec:
        """Return a copy with another digest."""
        copied = TensorSpec(self.dtype, self.shape, digest)
        object.__setattr__(copied, "_n_bytes", self._n_bytes)
        return copied

    def same_layout(self, other: TensorSpec) -> bool:
        """Return whether dtype and shape are equal."""
        return self.shape == other.shape and self.same_dtype(other)

    def same_dtype(self, other: TensorSpec) -> bool:
        """Return whether the dtypes are equal; most dtypes are the same object, which is quicker to see."""
        return self.dtype is other.dtype or self.dtype == other.dtype


class Named(Protocol):
    """A tensor of a checkpoint, as far as the file header describes it."""

    @property
    def file(self) -> str:
        """The path of its weight file."""

    @property
    def name(self) -> str:
        """Its name in that file."""

    @property
    def spec(self) -> TensorSpec:
        """Its dtype and shape; the digest may be unknown."""


@dataclass(frozen=True, slots=True)
class BaseTensor:
    """The base tensor that a target tensor is rebuilt from.

    Attributes:
        file: path of its weight file in the base.
        name: its name in that file.
        spec: dtype, shape and digest; the digest is known.
    """

    file: str
    name: str
    spec: TensorSpec

    @property
    def key(self) -> TensorKey:
        """File and name."""
        return self.file, self.name


@dataclass(frozen=True, slots=True)
class Row:
    """One tensor of the target, and how to rebuild it (FORMAT §4).

    Attributes:
        file: path of its weight file in the target.
        name: its name in that file.
        target: its dtype and shape, and its digest if that is known.
        base: the base tensor it is rebuilt from; None if there is none.
        keep: how many leading elements are taken from the base; all others start as zero bits.
        chunks: the changes, in ascending order of their first elements.
    """

    file: str
    name: str
    target: TensorSpec
    base: BaseTensor | None
    keep: int
    chunks: tuple[Chunk, ...]

    @property
    def key(self) -> TensorKey:
        """File and name."""
        return self.file, self.name

    @property
    def is_copied(self) -> bool:
        """Whether the tensor has exactly the bytes of its base tensor (FORMAT §4)."""
        if self.base is None or self.chunks:
            return False
        n_elements = self.target.n_elements
        same = self.base.spec is self.target or self.base.spec.n_elements == n_elements
        return same and self.keep == n_elements

    @property
    def keeps_all(self) -> bool:
        """Whether dtype and shape are the base's, and every element starts with the base's bits."""
        return (
            self.base is not None
            and self.base.spec.same_layout(self.target)
            and self.keep == self.target.n_elements
        )

    @property
    def nnz(self) -> int:
        """Number of touched elements."""
        return sum([chunk.nnz for chunk in self.chunks])

    @property
    def coded_bytes(self) -> int:
        """Size of all its chunks in the payload, in bytes."""
        return sum([chunk.stored_bytes for chunk in self.chunks])

    def with_chunks(self, chunks: tuple[Chunk, ...]) -> Row:
        """Return a copy with other chunks."""
        return Row(self.file, self.name, self.target, self.base, self.keep, chunks)


@dataclass(frozen=True, slots=True)
class Stored:
    """A header or side file in the payload (FORMAT §8).

    Attributes:
        n_bytes: its raw size.
        stored_bytes: its size in the payload; equal to ``n_bytes`` if it is not compressed.
        offset: position of its first byte in the payload.
    """

    n_bytes: int
    stored_bytes: int
    offset: int = field(compare=False)


@dataclass(frozen=True, slots=True)
class WeightFile:
    """A safetensors file of the target.

    Attributes:
        path: relative to the target folder.
        digest: digest of its header's bytes, 16 bytes.
        metadata: the ``__metadata__`` of a canonical header, in order; None if it has none.
        stored: where the bytes of the header are, if it is not canonical; None if it is.
    """

    path: str
    digest: bytes
    metadata: Mapping[str, str] | None
    stored: Stored | None


@dataclass(frozen=True, slots=True)
class SideFile:
    """A file of the target that is not a weight file.

    Attributes:
        path: relative to the target folder.
        n_bytes: its size.
        digest: digest of its content, 32 bytes.
        stored: where its content is in the payload; None if it is the base's file of the same path.
    """

    path: str
    n_bytes: int
    digest: bytes
    stored: Stored | None


@dataclass(frozen=True, slots=True)
class Base:
    """Hints about the base, which are never proof.

    Attributes:
        id: where the base can be found, such as ``org/model@<commit>``; None if it is not known.
        n_unused: how many of its tensors no row refers to.
    """

    id: str | None
    n_unused: int = 0


@dataclass(frozen=True, slots=True)
class Target:
    """The target's files.

    Attributes:
        is_folder: whether the target is a folder; otherwise it is one weight file.
        weight_files: in the order of their tensors in the manifest.
        side_files: sorted by path.
        empty_folders: paths of the folders that hold nothing, sorted.
    """

    is_folder: bool
    weight_files: tuple[WeightFile, ...]
    side_files: tuple[SideFile, ...]
    empty_folders: tuple[str, ...]


def default_keep(base: TensorSpec | None, target: TensorSpec) -> int:
    """Return how many leading elements of the base the target can keep (FORMAT §4)."""
    if base is None or not base.same_dtype(target):
        return 0
    return min(base.n_elements, target.n_elements)

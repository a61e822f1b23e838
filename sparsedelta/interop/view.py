"""A target that is rebuilt while it is read: the base, with some tensors replaced by what a delta makes of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Protocol

import numpy as np
import numpy.typing as npt

from sparsedelta.codecs.values import Bits
from sparsedelta.errors import Corrupt, StructureMismatch
from sparsedelta.files.checkpoint import Checkpoint, Tensor
from sparsedelta.format.records import TensorKey, TensorSpec
from sparsedelta.tensors.compare import Source as Readable
from sparsedelta.tensors.parallel import n_workers


class Patch(Protocol):
    """What a foreign delta does to one tensor."""

    def __call__(self, old: Bits, spec: TensorSpec) -> Bits:
        """Return the new bits of a tensor.

        Args:
            old: its bits in the base, shape (n,); may be changed in place and returned.
            spec: its dtype and shape.

        Raises:
            FormatError: the delta does not fit the tensor, or is damaged.
        """


@dataclass(frozen=True, slots=True)
class PatchedTensor(Tensor):
    """A tensor of the target; ``load`` returns all of its bytes."""

    load: Callable[[TensorKey], npt.NDArray[np.uint8]]

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` with the tensor's bytes from ``offset``."""
        buffer[:] = self.load(self.key).data[offset : offset + len(buffer)]


class PatchedCheckpoint(Checkpoint):
    """The target of a foreign delta: the files of the base, with patched tensors.

    It uses the open files of the base, which must stay open. Each tensor is rebuilt as a whole when it is read.
    """

    def __init__(self, base: Checkpoint, patches: Mapping[str, Patch]) -> None:
        """Find the tensors of the base that ``patches`` change, by name.

        Raises:
            StructureMismatch: the base has no tensor of a name, or has it twice.
        """
        self.path = base.path
        self.is_folder = base.is_folder
        self._fds = []
        self.roles = base.roles
        self.side_files = base.side_files
        self.empty_folders = base.empty_folders
        self.left_out = ()
        self._base = base
        self._patches = {tensor.key: patches[tensor.name] for tensor in named(base, patches)}
        self._load = lru_cache(n_workers())(self._rebuilt)
        self.tensors = {tensor.key: self._view(tensor) for tensor in base.tensors.values()}
        self.weight_files = tuple(
            replace(file, tensors=tuple(self.tensors[t.key] for t in file.tensors))
            for file in base.weight_files
        )

    def _view(self, tensor: Tensor) -> Tensor:
        if tensor.key not in self._patches:
            return tensor
        return PatchedTensor(
            tensor.file, tensor.name, tensor.spec, tensor.fd, tensor.offset, self._load
        )

    def _rebuilt(self, key: TensorKey) -> npt.NDArray[np.uint8]:
        tensor = self._base.tensors[key]
        new = self._patches[key](bits_of(tensor), tensor.spec)
        return new.view(np.uint8)

    def close(self) -> None:
        """Release the tensors; the base stays open."""
        self._load.cache_clear()


def named(base: Checkpoint, names: Mapping[str, object]) -> list[Tensor]:
    """Return the tensors of a base with these names, in the order of the base.

    Raises:
        StructureMismatch: the base lacks a name, or has it in two files.
    """
    found = [tensor for tensor in base.tensors.values() if tensor.name in names]
    by_name: dict[str, Tensor] = {}
    for tensor in found:
        other = by_name.setdefault(tensor.name, tensor)
        if other is not tensor:
            raise StructureMismatch(
                f"tensor {tensor.name!r} is in '{other.file}' and in '{tensor.file}' of '{base.path}', and the"
                " delta does not say which one it changes; leave out one of the files (exclude)",
                tensor=tensor.name,
            )
    missing = sorted(names.keys() - by_name.keys())
    if missing:
        more = f" and {len(missing) - 1} more tensors" if len(missing) > 1 else ""
        raise StructureMismatch(
            f"the delta changes {missing[0]!r}{more}, which '{base.path}' lacks; use the base that the delta was"
            " made from, with the same names",
            tensor=missing[0],
        )
    return found


def bits_of(tensor: Readable) -> Bits:
    """Return all bits of a tensor, shape (n,), as unsigned integers of its element's width."""
    bits = np.empty(tensor.spec.n_elements, tensor.spec.dtype.view)
    if len(bits):
        tensor.read_into(bits.view(np.uint8).data, 0)
    return bits


def check_indices(indices: npt.NDArray[np.int64], spec: TensorSpec, name: str) -> None:
    """Check flat indices that a file holds.

    Args:
        indices: (nnz,) int64.
        spec: the tensor that they point into.
        name: its name, for the message.

    Raises:
        Corrupt: they are not strictly increasing, or point outside the tensor.
    """
    if not len(indices):
        return
    if int(indices[0]) < 0 or int(indices[-1]) >= spec.n_elements:
        raise Corrupt(
            f"tensor {name!r} has {spec.n_elements} elements, but the delta changes element"
            f" {int(indices[-1] if indices[0] >= 0 else indices[0])}; use the base that the delta was made from",
            tensor=name,
        )
    if not bool((np.diff(indices) > 0).all()):
        raise Corrupt(
            f"tensor {name!r}: the indices of the delta are not strictly increasing; the delta is damaged",
            tensor=name,
        )


def check_same_length(n_indices: int, n_values: int, name: str) -> None:
    """Raise Corrupt if there are not as many values as indices."""
    if n_indices != n_values:
        raise Corrupt(
            f"tensor {name!r} has {n_indices} indices and {n_values} values; the delta is damaged",
            tensor=name,
        )

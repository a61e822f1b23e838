"""Find the tensors that a delta's rows refer to, in a checkpoint or in another delta's target (FORMAT §10)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Generic, TypeAlias, TypeVar

from sparsedelta.format.delta import Delta
from sparsedelta.format.digests import base_tensors
from sparsedelta.format.records import Named, TensorKey

T = TypeVar("T", bound=Named)
_Layout: TypeAlias = tuple[str, str, tuple[int, ...], int]


def _layout(tensor: Named) -> _Layout:
    """Return what a file header states about a tensor; it does not state the element type."""
    spec = tensor.spec
    return tensor.name, spec.dtype.name, spec.shape, spec.n_bytes


class Lookup(Generic[T]):
    """Finds tensors by file and name, or by name alone if they are in another file.

    Args:
        tensors: the tensors of the checkpoint.
        digest: returns the digest of a tensor; None if it is not known.
    """

    def __init__(self, tensors: Iterable[T], digest: Callable[[T], bytes | None]) -> None:
        self._digest = digest
        self._by_key: dict[TensorKey, T] = {}
        self._by_name: dict[_Layout, list[T]] = defaultdict(list)
        for tensor in tensors:
            self._by_key[tensor.file, tensor.name] = tensor
            self._by_name[_layout(tensor)].append(tensor)

    def find(self, wanted: Named) -> T | None:
        """Return the tensor with the name, dtype and shape of ``wanted``; None if there is none.

        The tensor of the same file is preferred, then one with the digest of ``wanted``.
        """
        exact = self._by_key.get((wanted.file, wanted.name))
        if exact is not None and _layout(exact) == _layout(wanted):
            return exact
        others = self._by_name.get(_layout(wanted), [])
        if len(others) < 2:
            return others[0] if others else None
        return next((t for t in others if self._digest(t) == wanted.spec.digest), others[0])

    def lacks(self, wanted: Named) -> bool:
        """Return whether ``find`` returns None, at any number of tensors without reading one."""
        return _layout(wanted) not in self._by_name

    def at(self, file: str, name: str) -> T | None:
        """Return the tensor of a file and name, or else any tensor of that name; None if there is none."""
        exact = self._by_key.get((file, name))
        if exact is not None:
            return exact
        return next((t for (_, own), t in self._by_key.items() if own == name), None)


def base_conflict(one: Delta, other: Delta) -> str | None:
    """Return the name of a tensor in which the bases of two deltas differ.

    None if both deltas may have the same base: at least one uses no base tensor, or they use common
    base tensors and all of these are equal. The files that hold the tensors count only if several have
    tensors of one name.
    """
    first, second = base_tensors(one.tensors), base_tensors(other.tensors)
    by_name = [{("", name): spec for (_, name), spec in b.items()} for b in (first, second)]
    if len(by_name[0]) == len(first) and len(by_name[1]) == len(second):
        first, second = by_name
    common = sorted(first.keys() & second.keys())
    if first and second and not common:
        return next(iter(first))[1]
    return next((key[1] for key in common if first[key] != second[key]), None)

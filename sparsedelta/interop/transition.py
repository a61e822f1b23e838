"""Base and target as the writers see them: the changed tensors in order, and a record of what is lost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from sparsedelta.codecs.values import Bits
from sparsedelta.dtypes import DType
from sparsedelta.files.checkpoint import Checkpoint, Tensor
from sparsedelta.files.side_files import digest_file
from sparsedelta.format.records import TensorSpec
from sparsedelta.interop.abilities import Abilities
from sparsedelta.interop.view import bits_of

_EXPONENTS = {"F16": 0x7C00, "BF16": 0x7F80, "F32": 0x7F800000}


@dataclass(frozen=True, slots=True)
class Changed:
    """A tensor that differs between base and target, and has the same dtype and shape in both.

    Attributes:
        file: path of its weight file in the base.
        name: its name.
        spec: dtype and shape.
        indices: (nnz,) int64, the flat indices at which the bits differ, in order.
        old, new: (n,) all bits of base and target.
    """

    file: str
    name: str
    spec: TensorSpec
    indices: npt.NDArray[np.int64]
    old: Bits
    new: Bits

    @property
    def values(self) -> Bits:
        """The new bits at the indices, shape (nnz,)."""
        found: Bits = self.new[self.indices]
        return found


@dataclass(slots=True)
class Transition:
    """A base and a target, open.

    Attributes:
        base, target: the checkpoints.
        abilities: those of the form that is written.
        losses: what the form cannot hold, one sentence each; complete after ``changed`` has ended.
        n_changed, nnz: tensors and elements that are written.
    """

    base: Checkpoint
    target: Checkpoint
    abilities: Abilities
    losses: list[str] = field(default_factory=list)
    n_changed: int = 0
    nnz: int = 0

    def lose(self, what: str, *, n_tensors: int = 0, n_elements: int = 0) -> None:
        """Record a loss; ``changed`` has yielded the tensors and elements that are lost."""
        self.losses.append(what)
        self.n_changed -= n_tensors
        self.nnz -= n_elements

    def changed(self) -> Iterator[Changed]:
        """Yield the changed tensors, sorted by name, as far as the form can hold the changes."""
        self._check_structure()
        for name, (old, new) in sorted(_pairs(self.base, self.target).items()):
            one = None if old is new else _difference(name, old, new)
            if one is not None:
                one = self._held(one)
            if one is not None:
                self.n_changed += 1
                self.nnz += len(one.indices)
                yield one

    def all_tensors(self) -> Iterator[Tensor]:
        """Yield the tensors of the target, sorted by name."""
        yield from sorted(self.target.tensors.values(), key=lambda tensor: tensor.name)

    def _held(self, one: Changed) -> Changed | None:
        """Return the part of a change that the form can hold; None if there is none."""
        can = self.abilities
        if can.dtypes is not None and one.spec.dtype.name not in can.dtypes:
            self.lose(
                f"the {len(one.indices)} changed elements of {one.name!r}, because its dtype"
                f" {one.spec.dtype.name} is not one of {', '.join(sorted(can.dtypes))}"
            )
            return None
        dropped = np.zeros(len(one.indices), np.bool_)
        old, new = one.old[one.indices], one.new[one.indices]
        if not can.nan:
            is_nan = nan_bits(one.spec.dtype, new)
            self._count(one.name, is_nan, "whose new value is NaN")
            dropped |= is_nan
        if not can.signed_zero:
            zero = magnitude(one.spec.dtype, old | new) == 0
            self._count(one.name, zero, "whose only change is the sign of zero")
            dropped |= zero
        if not dropped.any():
            return one
        kept = one.indices[~dropped]
        if not len(kept):
            return None
        new_bits = one.old.copy()
        new_bits[kept] = one.new[kept]
        return Changed(one.file, one.name, one.spec, kept, one.old, new_bits)

    def _count(self, name: str, which: npt.NDArray[np.bool_], why: str) -> None:
        if n := int(which.sum()):
            self.lose(f"{n} elements of {name!r} {why}")

    def _check_structure(self) -> None:
        can = self.abilities
        if not can.structure:
            self._check_tensors()
        if not can.files:
            self._check_files()

    def _check_tensors(self) -> None:
        old, new = by_name(self.base), by_name(self.target)
        for verb, names in (
            ("added", new.keys() - old.keys()),
            ("removed", old.keys() - new.keys()),
        ):
            if names:
                more = f" and {len(names) - 1} more" if len(names) > 1 else ""
                self.lose(f"the {verb} tensor {min(names)!r}{more}")
        for name in sorted(old.keys() & new.keys()):
            if not old[name].spec.same_layout(new[name].spec):
                self.lose(f"the new dtype or shape of {name!r}")

    def _check_files(self) -> None:
        differing = sorted(
            path
            for path in self.base.side_files.keys() | self.target.side_files.keys()
            if not self._same_file(path)
        )
        if differing:
            more = f" and {len(differing) - 1} more" if len(differing) > 1 else ""
            self.lose(f"the side file {differing[0]!r}{more}, which base and target do not share")
        old = {file.path: file.raw_header for file in self.base.weight_files}
        new = {file.path: file.raw_header for file in self.target.weight_files}
        if not self.base.is_folder and not self.target.is_folder:
            old, new = ({"": header} for (header,) in (old.values(), new.values()))
        if old != new and by_name(self.base).keys() == by_name(self.target).keys():
            self.lose("the division into files, or the metadata in their headers")

    def _same_file(self, path: str) -> bool:
        old, new = self.base.side_files.get(path), self.target.side_files.get(path)
        if old is None or new is None:
            return False
        return old == new or digest_file(old) == digest_file(new)


def by_name(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint by name.

    Raises:
        ValueError: two files hold a tensor of the same name, which most forms cannot tell apart.
    """
    counts = Counter(tensor.name for tensor in checkpoint.tensors.values())
    twice = [name for name, n in counts.items() if n > 1]
    if twice:
        raise ValueError(
            f"'{checkpoint.path}' has tensor {min(twice)!r} in several files, which other forms cannot tell"
            " apart; leave out the other files (exclude)"
        )
    return {tensor.name: tensor for tensor in checkpoint.tensors.values()}


def _pairs(base: Checkpoint, target: Checkpoint) -> dict[str, tuple[Tensor, Tensor]]:
    old, new = by_name(base), by_name(target)
    return {
        name: (old[name], new[name])
        for name in old.keys() & new.keys()
        if old[name].spec.same_layout(new[name].spec)
    }


def _difference(name: str, old: Tensor, new: Tensor) -> Changed | None:
    before, after = bits_of(old), bits_of(new)
    indices = np.flatnonzero(before != after).astype(np.int64, copy=False)
    if not len(indices):
        return None
    return Changed(old.file, name, old.spec, indices, before, after)


def magnitude(dtype: DType, bits: Bits) -> Bits:
    """Return float bits without their signs."""
    found: Bits = bits & bits.dtype.type((1 << (8 * dtype.width - 1)) - 1)
    return found


def nan_bits(dtype: DType, bits: Bits) -> npt.NDArray[np.bool_]:
    """Return which elements of a tensor of dtype F16, BF16 or F32 are NaN."""
    found: npt.NDArray[np.bool_] = magnitude(dtype, bits) > _EXPONENTS[dtype.name]
    return found

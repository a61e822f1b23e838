"""Patches that add floating-point numbers: the sum is computed in float32 and rounded once to the base's dtype."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sparsedelta.codecs.values import Bits
from sparsedelta.dtypes import DType
from sparsedelta.errors import Corrupt
from sparsedelta.format.records import TensorSpec
from sparsedelta.interop.abilities import FLOATS
from sparsedelta.interop.transition import Changed
from sparsedelta.interop.view import check_indices, check_same_length
from sparsedelta.ops.merging.floats import to_bits, to_numbers

Numbers = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Addition:
    """Numbers that are added at flat indices.

    Attributes:
        name: name of the tensor, for messages.
        indices: (nnz,) int64; None for all elements.
        numbers: (nnz,) float32.
    """

    name: str
    indices: npt.NDArray[np.int64] | None
    numbers: Numbers

    def __call__(self, old: Bits, spec: TensorSpec) -> Bits:
        """Return the new bits; see ``Patch``."""
        check_addable(spec, self.name)
        if self.indices is None:
            check_same_length(len(old), len(self.numbers), self.name)
            return added(spec.dtype, old, self.numbers)
        check_same_length(len(self.indices), len(self.numbers), self.name)
        check_indices(self.indices, spec, self.name)
        old[self.indices] = added(spec.dtype, old[self.indices], self.numbers)
        return old


def check_addable(spec: TensorSpec, name: str) -> None:
    """Raise Corrupt if the base tensor has no dtype to which numbers can be added."""
    if spec.dtype.name not in FLOATS:
        raise Corrupt(
            f"tensor {name!r} is {spec.dtype.name} in the base, but the delta adds numbers, which is possible only"
            f" for {', '.join(sorted(FLOATS))}",
            tensor=name,
        )


def added(dtype: DType, old: Bits, numbers: Numbers) -> Bits:
    """Return the bits of old values plus numbers, computed in float32 and rounded once."""
    with np.errstate(all="ignore"):
        return to_bits(dtype, (to_numbers(dtype, old) + numbers).astype(np.float32))


def differences(one: Changed) -> tuple[Numbers, npt.NDArray[np.bool_]]:
    """Return the numbers to add at the changed elements, and for which of them the sum is exactly the new value.

    If the rounded difference does not give the new value, its neighbours are tried.
    """
    dtype = one.spec.dtype
    old, new = one.old[one.indices], one.values
    with np.errstate(all="ignore"):
        numbers = (to_numbers(dtype, new) - to_numbers(dtype, old)).astype(np.float32)
        exact = added(dtype, old, numbers) == new
        for direction in (np.float32(np.inf), np.float32(-np.inf)):
            other = np.nextafter(numbers, direction)
            better = ~exact & (added(dtype, old, other) == new)
            numbers[better], exact = other[better], exact | better
    return numbers, exact

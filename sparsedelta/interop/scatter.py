"""Patches that write new values at flat indices: what most sparse forms come to."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sparsedelta.codecs.values import Bits
from sparsedelta.errors import Corrupt
from sparsedelta.format.records import TensorSpec
from sparsedelta.interop.view import check_indices, check_same_length


@dataclass(frozen=True, slots=True)
class Scatter:
    """New values at flat indices.

    Attributes:
        name: name of the tensor, for messages.
        dtype: dtype of the values.
        indices: (nnz,) integers.
        values: (nnz,) bits.
        shape: the shape that the file states; None if it states none.
    """

    name: str
    dtype: str
    indices: npt.NDArray[np.int64]
    values: Bits
    shape: tuple[int, ...] | None = None

    def __call__(self, old: Bits, spec: TensorSpec) -> Bits:
        """Return the new bits; see ``Patch``."""
        if self.shape is not None:
            check_shape(self.shape, spec, self.name)
        check_same_length(len(self.indices), len(self.values), self.name)
        check_indices(self.indices, spec, self.name)
        old[self.indices] = self._as_base(spec)
        return old

    def _as_base(self, spec: TensorSpec) -> Bits:
        """Return the values in the base's dtype, which must be able to hold them exactly."""
        if self.dtype == spec.dtype.name:
            return self.values
        if (self.dtype, spec.dtype.name) == ("BF16", "F32"):
            wide: Bits = self.values.astype(np.uint32) << np.uint32(16)
            return wide
        raise Corrupt(
            f"tensor {self.name!r} is {spec.dtype.name} in the base, but the delta holds {self.dtype} values; use"
            " the base that the delta was made from",
            tensor=self.name,
        )


def check_shape(stated: tuple[int, ...], spec: TensorSpec, name: str) -> None:
    """Raise Corrupt if the shape that a file states is not that of the base."""
    if stated != spec.shape:
        raise Corrupt(
            f"tensor {name!r} has shape {list(spec.shape)} in the base and {list(stated)} in the"
            " delta; use the base that the delta was made from",
            tensor=name,
        )

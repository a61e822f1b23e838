"""Convert between bit patterns and floating-point numbers for the arithmetic of ``merge``.

Conversion to numbers is exact. Conversion to bits rounds once.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from sparsedelta.codecs.values import Bits
from sparsedelta.dtypes import DType

Numbers: TypeAlias = npt.NDArray[np.floating[Any]]

_SINGLE: np.dtype[np.floating[Any]] = np.dtype(np.float32)
_DOUBLE: np.dtype[np.floating[Any]] = np.dtype(np.float64)
_WORK = {"F16": _SINGLE, "BF16": _SINGLE, "F32": _SINGLE, "F64": _DOUBLE}
_QUIET_NAN = 0x7FC0


def work_dtype(dtype: DType) -> np.dtype[np.floating[Any]] | None:
    """Return the dtype in which tensors of ``dtype`` are merged: float32 or float64.

    None if tensors of ``dtype`` cannot be merged in floating point.
    """
    return _WORK.get(dtype.name)


def to_numbers(dtype: DType, bits: Bits) -> Numbers:
    """Return the exact values of bit patterns, in the dtype that ``work_dtype`` returns."""
    if dtype.name == "BF16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return bits.view(f"<f{dtype.width}").astype(_WORK[dtype.name])


def to_bits(dtype: DType, numbers: Numbers) -> Bits:
    """Return the bit patterns of the nearest values, ties to even, as IEEE 754 rounds."""
    if dtype.name != "BF16":
        with np.errstate(over="ignore"):  # numbers that are too large become infinity
            return numbers.astype(f"<f{dtype.width}").view(dtype.view)
    raw = numbers.view(np.uint32)
    rounded = (raw + ((raw >> np.uint32(16)) & np.uint32(1)) + np.uint32(0x7FFF)) >> np.uint32(16)
    return np.where(np.isnan(numbers), _QUIET_NAN, rounded).astype(np.uint16)

"""The closed table of tensor dtypes (FORMAT §1.1): every dtype of safetensors 0.8 and no other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class DType:
    """How one wire dtype is stored.

    Attributes:
        name: the name in a safetensors header.
        bits: bits per value.
        width: bytes per element as the format counts it; types below a byte count bytes.
        is_float: whether bit patterns are ordered as sign-magnitude floats.
    """

    name: str
    bits: int
    width: int
    is_float: bool

    @property
    def view(self) -> np.dtype[np.unsignedinteger]:
        """The unsigned little-endian integer of that width."""
        return np.dtype(f"<u{self.width}")


def _table() -> dict[str, DType]:
    rows = [
        (8, 1, False, "BOOL U8 I8 F8_E8M0"),
        (8, 1, True, "F8_E5M2 F8_E4M3 F8_E4M3FNUZ F8_E5M2FNUZ"),
        (4, 1, False, "F4"),
        (6, 1, False, "F6_E2M3 F6_E3M2"),
        (16, 2, False, "U16 I16"),
        (16, 2, True, "F16 BF16"),
        (32, 4, False, "U32 I32"),
        (32, 4, True, "F32"),
        (64, 8, False, "U64 I64 C64"),
        (64, 8, True, "F64"),
    ]
    return {
        name: DType(name, bits, width, is_float)
        for bits, width, is_float, names in rows
        for name in names.split()
    }


DTYPES = _table()


def tensor_bytes(dtype: DType, shape: Sequence[int]) -> int:
    """Return the size in bytes of a tensor.

    Raises:
        OverflowError: the size in bits reaches 2^63, or an intermediate product of dimensions does.
        ValueError: the tensor does not fill a whole number of bytes.
    """
    bits = dtype.bits
    for size in sorted(shape):  # a zero first: an empty tensor never overflows
        bits *= size
        if bits >= 1 << 63:
            raise OverflowError(f"shape {list(shape)} of {dtype.name} exceeds 2^63 bits")
    if bits % 8:
        raise ValueError(f"shape {list(shape)} of {dtype.name} is not a whole number of bytes")
    return bits // 8

"""Dtypes and element types (FORMAT §1.1): how many bits a value has, and what counts as one element."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sparsedelta.errors import Corrupt, LimitExceeded, UnsupportedFeature

MAX_BITS = 1024  # of a value
MAX_NAME_BYTES = 64
_WIDTHS = (1, 2, 4, 8)


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
    def element(self) -> str:
        """The element type, such as ``f2``."""
        return f"{'f' if self.is_float else 'i'}{self.width}"

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


def check_dtype(name: str, bits: int, element: str) -> DType:
    """Return the dtype that a delta describes.

    Raises:
        Corrupt: a dtype of safetensors 0.8 has other bits or another element type, or bits are 0.
        LimitExceeded: the name is longer, or a value has more bits, than the format allows.
        UnsupportedFeature: no such element type is known.
    """
    if len(name) > MAX_NAME_BYTES or len(name.encode("utf-8")) > MAX_NAME_BYTES:
        raise LimitExceeded(f"dtype {name[:80]!r}… is longer than {MAX_NAME_BYTES} bytes")
    width = int(element[1:]) if element[1:].isascii() and element[1:].isdigit() else 0
    if element[:1] not in ("i", "f") or width not in _WIDTHS or len(element) != 2:
        raise UnsupportedFeature(f"dtype {name[:80]!r} has unknown element type {element[:80]!r}")
    if bits > MAX_BITS:
        raise LimitExceeded(f"dtype {name[:80]!r} has {bits} bits, the limit is {MAX_BITS}")
    found = DType(name, bits, width, element[0] == "f")
    if found != DTYPES.get(name, found) or not bits:
        raise Corrupt(f"dtype {name[:80]!r} is described with {bits} bits as {element}")
    return found


def dtype_of(name: str, shape: Sequence[int], n_bytes: int) -> DType:
    """Return the dtype of a tensor in a safetensors file; of an unknown one elements are bytes.

    Raises:
        Corrupt: values of an unknown dtype do not have a whole number of bits.
        LimitExceeded: they have more than ``MAX_BITS``.
    """
    known = DTYPES.get(name)
    if known is not None:
        return known
    n_values = math.prod(shape)
    bits, rest = divmod(8 * n_bytes, n_values) if n_values else (8, n_bytes)
    if rest or not bits:
        raise Corrupt(f"dtype {name!r} is unknown, and {n_bytes} bytes do not fit {list(shape)}")
    return check_dtype(name, bits, "i1")


def tensor_bytes(dtype: DType, shape: Sequence[int]) -> int:
    """Return the size in bytes of a tensor.

    Raises:
        LimitExceeded: the size in bits reaches 2^63, or an intermediate product of dimensions does.
        Corrupt: the tensor does not fill a whole number of bytes or elements.
    """
    bits = dtype.bits
    for size in sorted(shape):  # a zero first: an empty tensor never overflows
        bits *= size
        if bits >= 1 << 63:
            raise LimitExceeded(f"shape {list(shape)} of {dtype.name[:80]} exceeds 2^63 bits")
    if bits % (8 * dtype.width):
        raise Corrupt(
            f"shape {list(shape)} of {dtype.name[:80]} is not a whole number of bytes and elements"
        )
    return bits // 8

"""Dtypes (bits per value) and element types (bytes per element), as in FORMAT §1.1."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sparsedelta.errors import Corrupt, LimitExceeded, UnsupportedFeature

MAX_BITS = 1024  # per value
MAX_NAME_BYTES = 64
WIDTHS = (1, 2, 4, 8)


@dataclass(frozen=True, slots=True)
class DType:
    """A dtype of safetensors files, and how its values are stored.

    Attributes:
        name: the name in a safetensors header.
        bits: bits per value.
        width: bytes per element; 1 if a value has fewer than 8 bits.
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
        """The unsigned little-endian integer dtype of ``width`` bytes."""
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
    """Return the dtype with this name, number of bits and element type.

    Raises:
        Corrupt: ``bits`` is 0, or a dtype of safetensors 0.8 has other bits or another element type.
        LimitExceeded: the name is too long, or a value has too many bits.
        UnsupportedFeature: the element type is unknown.
    """
    if len(name) > MAX_NAME_BYTES or len(name.encode("utf-8")) > MAX_NAME_BYTES:
        raise LimitExceeded(f"dtype {name[:80]!r}… is longer than {MAX_NAME_BYTES} bytes")
    width = int(element[1:]) if element[1:].isascii() and element[1:].isdigit() else 0
    if element[:1] not in ("i", "f") or width not in WIDTHS or len(element) != 2:
        raise UnsupportedFeature(f"dtype {name[:80]!r} has unknown element type {element[:80]!r}")
    if bits > MAX_BITS:
        raise LimitExceeded(f"dtype {name[:80]!r} has {bits} bits, the limit is {MAX_BITS}")
    found = DType(name, bits, width, element[0] == "f")
    if found != DTYPES.get(name, found) or not bits:
        raise Corrupt(f"dtype {name[:80]!r} cannot have {bits} bits and element type {element}")
    return found


def dtype_of(name: str, shape: Sequence[int], n_bytes: int) -> DType:
    """Return the dtype of a tensor in a safetensors file.

    The elements of an unknown dtype are bytes. Its bits per value follow from shape and size.

    Raises:
        Corrupt: the values of an unknown dtype do not have a whole number of bits.
        LimitExceeded: they have more than ``MAX_BITS``, or the name is too long.
    """
    known = DTYPES.get(name)
    if known is not None:
        return known
    n_values = math.prod(shape)
    bits, rest = divmod(8 * n_bytes, n_values) if n_values else (8, n_bytes)
    if rest or not bits:
        raise Corrupt(
            f"dtype {name!r} is unknown, and {n_bytes} bytes cannot be divided evenly among the values"
            f" of shape {list(shape)}"
        )
    return check_dtype(name, bits, "i1")


def tensor_bytes(dtype: DType, shape: Sequence[int]) -> int:
    """Return the size in bytes of a tensor.

    Raises:
        LimitExceeded: the size in bits reaches 2^63, or an intermediate product of dimensions does.
        Corrupt: the tensor does not fill a whole number of bytes or elements.
    """
    bits = dtype.bits
    for size in sorted(shape):  # zeros come first, so an empty tensor never overflows
        bits *= size
        if bits >= 1 << 63:
            raise LimitExceeded(
                f"a tensor of shape {list(shape)} and dtype {dtype.name[:80]} has 2^63 bits or more"
            )
    if bits % (8 * dtype.width):
        raise Corrupt(
            f"a tensor of shape {list(shape)} and dtype {dtype.name[:80]} does not fill a whole number"
            " of bytes and elements"
        )
    return bits // 8

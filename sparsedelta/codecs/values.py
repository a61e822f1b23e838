"""Value encodings (FORMAT §7): codes for touched values, exact for every bit pattern.

``target`` stores the new bits; ``ulp`` the difference to the base's bits in units of the last place,
which is small for small updates and forms a group.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from sparsedelta.dtypes import DType

Bits = npt.NDArray[Any]  # (nnz,) unsigned, of the dtype's view


@dataclass(frozen=True, slots=True)
class ValueEncoding:
    """One value encoding: codes from (base bits, target bits), and target bits from (base bits, codes).

    All arrays are ``(nnz,)`` of ``dtype.view``; neither function changes its arguments.
    """

    encode: Callable[[DType, Bits, Bits], Bits]
    decode: Callable[[DType, Bits, Bits], Bits]


def _target_encode(dtype: DType, base: Bits, target: Bits) -> Bits:
    return target


def _target_decode(dtype: DType, base: Bits, codes: Bits) -> Bits:
    return codes


def _ulp_encode(dtype: DType, base: Bits, target: Bits) -> Bits:
    difference = _ordered(dtype, target)
    difference -= _ordered(dtype, base)
    sign = _sign_fill(difference)
    difference <<= 1
    difference ^= sign
    return difference


def _ulp_decode(dtype: DType, base: Bits, codes: Bits) -> Bits:
    result = codes & 1
    np.negative(result, out=result)  # all ones where the difference is negative
    result ^= codes >> 1
    result += _ordered(dtype, base)
    return _unordered(dtype, result)


def _sign_fill(bits: Bits) -> Bits:
    """Return all ones where the sign bit is set, else zero."""
    signed = bits.view(f"<i{bits.itemsize}") >> (8 * bits.itemsize - 1)
    return signed.view(bits.dtype)


def _ordered(dtype: DType, bits: Bits) -> Bits:
    """Return a copy in which unsigned order is the order of the values."""
    if not dtype.is_float:
        return bits.copy()
    flip = _sign_fill(bits)
    flip |= bits.dtype.type(1 << (8 * bits.itemsize - 1))
    flip ^= bits
    return flip


def _unordered(dtype: DType, ordered: Bits) -> Bits:
    """Undo ``_ordered``, in place."""
    if dtype.is_float:
        flip = _sign_fill(ordered)
        np.invert(flip, out=flip)
        flip |= ordered.dtype.type(1 << (8 * ordered.itemsize - 1))
        ordered ^= flip
    return ordered


VALUE_ENCODINGS: Mapping[str, ValueEncoding] = MappingProxyType(
    {
        "ulp": ValueEncoding(_ulp_encode, _ulp_decode),
        "target": ValueEncoding(_target_encode, _target_decode),
    }
)


def plane(codes: Bits, number: int) -> npt.NDArray[np.uint8]:
    """Return byte ``number`` (0 the least significant) of every code; a view, not contiguous."""
    return codes.view(np.uint8).reshape(len(codes), codes.itemsize)[:, number]

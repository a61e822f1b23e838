"""Value encodings (FORMAT §7): codes for touched values, exact for every bit pattern.

``target`` stores the target's bits. ``ulp`` stores the difference to the base in units of the last place. Such
differences are small for small updates, and can be added and negated exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from sparsedelta.codecs import kernels
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
    if kernels.native:
        return _compiled(kernels.native.encode_values, dtype, base, target)
    difference = ordered(dtype, target)
    difference -= ordered(dtype, base)
    return ulp_codes(difference)


def _ulp_decode(dtype: DType, base: Bits, codes: Bits) -> Bits:
    if kernels.native:
        return _compiled(kernels.native.decode_values, dtype, base, codes)
    result = ulp_differences(codes)
    result += ordered(dtype, base)
    return unordered(dtype, result)


def _compiled(work: Callable[..., object], dtype: DType, before: Bits, after: Bits) -> Bits:
    result = np.empty(after.shape, after.dtype)
    pair = map(np.ascontiguousarray, (before, after))
    work(*pair, KINDS["ulp"] + dtype.is_float, result)
    return result


def ulp_codes(differences: Bits) -> Bits:
    """Turn differences modulo 2^(8w) into their zigzag codes, in place, and return them."""
    sign = _sign_fill(differences)
    differences <<= 1
    differences ^= sign
    return differences


def ulp_differences(codes: Bits) -> Bits:
    """Return the differences modulo 2^(8w) that have these zigzag codes, as a new array."""
    result = codes & 1
    np.negative(result, out=result)  # all ones where the difference is negative
    result ^= codes >> 1
    return result


def _sign_fill(bits: Bits) -> Bits:
    """Return all ones where the sign bit is set, else zero."""
    signed = bits.view(f"<i{bits.itemsize}") >> (8 * bits.itemsize - 1)
    return signed.view(bits.dtype)


def ordered(dtype: DType, bits: Bits) -> Bits:
    """Return M of every element (FORMAT §7.2), as a copy. M, as an unsigned integer, has the same order as the values."""
    if not dtype.is_float:
        return bits.copy()
    flip = _sign_fill(bits)
    flip |= bits.dtype.type(1 << (8 * bits.itemsize - 1))
    flip ^= bits
    return flip


def unordered(dtype: DType, places: Bits) -> Bits:
    """Undo ``ordered``, in place."""
    if dtype.is_float:
        flip = _sign_fill(places)
        np.invert(flip, out=flip)
        flip |= places.dtype.type(1 << (8 * places.itemsize - 1))
        places ^= flip
    return places


def differences(
    base: Bits, target: Bits, start: int, positions: npt.NDArray[np.uint32]
) -> tuple[Bits, Bits]:
    """Return the bits of the elements that differ, in ``base`` and in ``target``.

    Args:
        base: a block before the change.
        target: the same block after the change.
        start: number of the first element of the blocks.
        positions: receives the numbers of the elements that differ; at least as long as the blocks.
    """
    if kernels.native:
        before, after = np.empty((2, len(base)), base.dtype)
        n = kernels.native.compare(base, target, start, positions, before, after)
        return before[:n], after[:n]
    where = np.flatnonzero(base != target)
    np.add(where, start, out=positions[: len(where)], casting="unsafe")
    return base[where], target[where]


def change(
    dtype: DType,
    bits: Bits,
    start: int,
    positions: npt.NDArray[np.uint32],
    values: str,
    codes: Bits,
) -> tuple[Bits, Bits]:
    """Change elements of a block, in place; return their bits before and after.

    Args:
        dtype: the dtype of the elements.
        bits: the block.
        start: number of the first element of the block.
        positions: (nnz,) numbers of elements of the block.
        values: the name of the value encoding.
        codes: (nnz,) codes of this encoding.
    """
    if kernels.native:
        before, after = np.empty((2, len(codes)), codes.dtype)
        kind = KINDS[values] + (values == "ulp" and dtype.is_float)
        kernels.native.change(bits, start, positions, codes, kind, before, after)
        return before, after
    where = positions - np.uint32(start)
    before = bits[where]
    after = VALUE_ENCODINGS[values].decode(dtype, before, codes)
    bits[where] = after
    return before, after


# The numbers of the value encodings in kernels/_native.c; "ulp" for floats has the number after "ulp".
KINDS: Mapping[str, int] = MappingProxyType({"target": 0, "ulp": 1})

VALUE_ENCODINGS: Mapping[str, ValueEncoding] = MappingProxyType(
    {
        "ulp": ValueEncoding(_ulp_encode, _ulp_decode),
        "target": ValueEncoding(_target_encode, _target_decode),
    }
)

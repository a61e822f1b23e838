"""Value codes follow FORMAT §7 for integers of any size, and decoding restores the exact values."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from helpers import BITS, assert_bit_equal

from sparsedelta.codecs.values import VALUE_ENCODINGS
from sparsedelta.dtypes import DTYPES, DType

SPECIAL = {
    1: [0x00, 0x01, 0x7F, 0x80, 0x81, 0xFE, 0xFF, 0x38],
    2: [0x0000, 0x0001, 0x007F, 0x3F80, 0x7F80, 0x7F81, 0x7FFF, 0x8000, 0x8001, 0xFF80, 0xFFFF],
    4: [0, 1, 0x3F800000, 0x7F800000, 0x7FC00001, 0x7FFFFFFF, 1 << 31, 0xFF800000, 0xFFFFFFFF],
    8: [0, 1, 0x3FF << 52, 0x7FF << 52, (1 << 63) - 1, 1 << 63, 0xFFF << 52, (1 << 64) - 1],
}


def order(dtype: DType, x: int) -> int:
    top = 1 << (8 * dtype.width - 1)
    if not dtype.is_float:
        return x
    return x + top if x < top else 2 * top - 1 - x


def ulp_code(dtype: DType, before: int, after: int) -> int:
    modulus = 1 << (8 * dtype.width)
    d = (order(dtype, after) - order(dtype, before)) % modulus
    return (2 * d) % modulus if d < modulus // 2 else 2 * (modulus - d) - 1


def all_pairs(dtype: DType) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    values = np.array(SPECIAL[dtype.width], dtype.view)
    before, after = np.meshgrid(values, values)
    return before.ravel(), after.ravel()


@pytest.mark.parametrize("name", BITS)
def test_ulp_codes_are_those_of_the_format(name: str) -> None:
    dtype = DTYPES[name]
    before, after = all_pairs(dtype)
    codes = VALUE_ENCODINGS["ulp"].encode(dtype, before, after)
    expected = [ulp_code(dtype, b, a) for b, a in zip(before.tolist(), after.tolist(), strict=True)]
    assert codes.tolist() == expected
    assert codes.dtype == dtype.view


@pytest.mark.parametrize("name", BITS)
@pytest.mark.parametrize("encoding", VALUE_ENCODINGS)
def test_decoding_undoes_and_leaves_arguments_alone(encoding: str, name: str) -> None:
    dtype = DTYPES[name]
    before, after = all_pairs(dtype)
    kept = before.copy(), after.copy()
    codes = VALUE_ENCODINGS[encoding].encode(dtype, before, after)
    kept_codes = codes.copy()
    assert_bit_equal(VALUE_ENCODINGS[encoding].decode(dtype, before, codes), kept[1])
    assert_bit_equal(before, kept[0])
    assert_bit_equal(after, kept[1])
    assert_bit_equal(codes, kept_codes)


@pytest.mark.parametrize(
    ("before", "after", "code"),
    [
        (0x3F80, 0x3F81, 2),
        (0x8000, 0x0000, 2),
        (0x3F80, 0x4080, 0x200),
        (0xBF80, 0xBF82, 3),
        (0x3F81, 0x3F80, 1),
        (0x0000, 0x8000, 1),
        (0x7FFF, 0xFFFF, 2),  # around: 2^16 - 1 back is 1 forth
    ],
)
def test_worked_example(before: int, after: int, code: int) -> None:
    bits = np.array([[before], [after]], np.uint16)
    assert VALUE_ENCODINGS["ulp"].encode(DTYPES["BF16"], bits[0], bits[1]).tolist() == [code]


def test_registry_is_the_formats() -> None:
    assert set(VALUE_ENCODINGS) == {"ulp", "target"}


def test_target_codes_are_the_new_bits() -> None:
    before, after = all_pairs(DTYPES["F32"])
    assert_bit_equal(VALUE_ENCODINGS["target"].encode(DTYPES["F32"], before, after), after)

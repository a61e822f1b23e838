"""The dtype table is that of safetensors, and sizes are checked before they are believed."""

from __future__ import annotations

from typing import Any

import pytest
import safetensors
from helpers import BITS, file_bytes, noise

from sparsedelta.dtypes import DTYPES, DType, check_dtype, dtype_of, tensor_bytes
from sparsedelta.errors import Corrupt, LimitExceeded, UnsupportedFeature

FLOATS = {"F8_E5M2", "F8_E4M3", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F16", "BF16", "F32", "F64"}


def test_table_is_the_formats() -> None:
    assert {name: dtype.bits for name, dtype in DTYPES.items()} == BITS
    assert {name for name, dtype in DTYPES.items() if dtype.is_float} == FLOATS


@pytest.mark.parametrize("name", BITS)
def test_element(name: str) -> None:
    dtype = DTYPES[name]
    assert dtype.name == name
    assert dtype.width == max(1, BITS[name] // 8)
    assert dtype.element == f"{'f' if name in FLOATS else 'i'}{dtype.width}"
    assert check_dtype(name, dtype.bits, dtype.element) == dtype
    assert dtype.view.str.lstrip("<|") == f"u{dtype.width}"


@pytest.mark.parametrize("name", BITS)
def test_safetensors_knows_it_and_agrees_on_the_size(name: str) -> None:
    tensor = noise(name, 3, 8)
    deserialize: Any = safetensors.deserialize
    ((_, read),) = deserialize(file_bytes({"w": tensor}))
    assert read["dtype"] == name
    assert len(read["data"]) == tensor_bytes(DTYPES[name], (3, 8))


@pytest.mark.parametrize(
    ("name", "shape", "size"),
    [
        ("BF16", (), 2),
        ("BF16", (0,), 0),
        ("F4", (6,), 3),
        ("F6_E2M3", (4,), 3),
        ("C64", (2, 3), 48),
        ("U8", (1 << 62, 0, 1 << 62), 0),
        ("U8", ((1 << 60) - 1,), (1 << 60) - 1),
        ("F4", ((1 << 61) - 2,), (1 << 60) - 1),
    ],
)
def test_sizes(name: str, shape: tuple[int, ...], size: int) -> None:
    assert tensor_bytes(DTYPES[name], shape) == size


@pytest.mark.parametrize(
    ("name", "shape"),
    [("F4", (3,)), ("F4", ()), ("F6_E3M2", (2,)), ("F6_E2M3", (3, 3))],
)
def test_part_of_a_byte_is_refused(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(Corrupt, match="whole number of bytes"):
        tensor_bytes(DTYPES[name], shape)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("U8", (1 << 60,)),
        ("F4", (1 << 61,)),
        ("F64", (1 << 57,)),
        ("U8", (1 << 32, 1 << 32)),
        ("U8", ((1 << 63) - 1,) * 64),
    ],
)
def test_overflow_is_refused(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(LimitExceeded, match="2\\^63 bits or more"):
        tensor_bytes(DTYPES[name], shape)


@pytest.mark.parametrize(
    ("shape", "n_bytes", "bits"),
    [((4,), 4, 8), ((4, 2), 3, 3), ((4,), 12, 24), ((), 128, 1024), ((0, 7), 0, 8)],
)
def test_elements_of_an_unknown_dtype_are_bytes(
    shape: tuple[int, ...], n_bytes: int, bits: int
) -> None:
    dtype = dtype_of("NEW", shape, n_bytes)
    assert dtype == DType("NEW", bits, 1, is_float=False)
    assert tensor_bytes(dtype, shape) == n_bytes
    assert dtype_of("BF16", shape, n_bytes) == DTYPES["BF16"]  # whatever it has been given


@pytest.mark.parametrize(
    ("shape", "n_bytes", "error"),
    [((3,), 1, Corrupt), ((3,), 0, Corrupt), ((0,), 1, Corrupt), ((), 129, LimitExceeded)],
)
def test_impossible_unknown_dtypes(
    shape: tuple[int, ...], n_bytes: int, error: type[Exception]
) -> None:
    with pytest.raises(error):
        dtype_of("NEW", shape, n_bytes)


def test_a_delta_may_describe_unknown_dtypes_and_known_ones_only_rightly() -> None:
    assert check_dtype("NEW", 16, "f2") == DType("NEW", 16, 2, is_float=True)
    assert check_dtype("bf16", 24, "i1").bits == 24  # names are compared as they are
    assert tensor_bytes(check_dtype("NEW", 24, "i2"), (2, 3)) == 18
    with pytest.raises(Corrupt, match="whole number of bytes and elements"):
        tensor_bytes(check_dtype("NEW", 24, "i2"), (3,))
    for bits, element in ((16, "i2"), (16, "f1"), (8, "f2"), (0, "f2")):
        with pytest.raises(Corrupt, match="cannot have"):
            check_dtype("BF16", bits, element)
    with pytest.raises(Corrupt):
        check_dtype("NEW", 0, "i1")
    with pytest.raises(LimitExceeded, match="1025 bits"):
        check_dtype("NEW", 1025, "i1")
    assert check_dtype("x" * 64, 8, "i1").bits == 8
    with pytest.raises(LimitExceeded, match="longer than 64 bytes"):
        check_dtype("\u00e9" * 33, 8, "i1")
    for element in ("", "i", "i3", "u1", "i16", "i01", "f\u00b2", "1i", "i 1"):
        with pytest.raises(UnsupportedFeature, match="unknown element type"):
            check_dtype("NEW", 8, element)

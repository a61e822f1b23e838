"""The dtype table is that of safetensors, and sizes are checked before they are believed."""

from __future__ import annotations

from typing import Any

import pytest
import safetensors
from helpers import BITS, file_bytes, noise

from sparsedelta.dtypes import DTYPES, tensor_bytes

FLOATS = {"F8_E5M2", "F8_E4M3", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F16", "BF16", "F32", "F64"}


def test_table_is_the_formats() -> None:
    assert {name: dtype.bits for name, dtype in DTYPES.items()} == BITS
    assert {name for name, dtype in DTYPES.items() if dtype.is_float} == FLOATS


@pytest.mark.parametrize("name", BITS)
def test_element(name: str) -> None:
    dtype = DTYPES[name]
    assert dtype.name == name
    assert dtype.width == max(1, BITS[name] // 8)
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
    with pytest.raises(ValueError, match="whole number of bytes"):
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
    with pytest.raises(OverflowError, match="exceeds 2\\^63 bits"):
        tensor_bytes(DTYPES[name], shape)

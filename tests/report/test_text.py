"""The format of numbers, sizes and names."""

from __future__ import annotations

import pytest

from sparsedelta.report.text import count, listed, numbers, percent, printable, size


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (1234, "1.23 kB"),
        (9_994, "9.99 kB"),
        (9_999, "10.0 kB"),
        (99_949, "99.9 kB"),
        (99_951, "100 kB"),
        (999_499, "999 kB"),
        (999_500, "1.00 MB"),
        (90_900_000, "90.9 MB"),
        (2_147_483_648, "2.15 GB"),
        (999_600_000_000, "1.00 TB"),
        (1_500_000_000_000_000, "1,500 TB"),
    ],
)
def test_size(n_bytes: int, text: str) -> None:
    assert size(n_bytes) == text


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0.0, "0 %"),
        (1.0, "100 %"),
        (0.9999, ">99.9 %"),
        (0.5, "50.0 %"),
        (0.00935, "0.935 %"),
        (0.000262, "0.026 %"),
        (0.000002, "0.0002 %"),
        (1e-9, "<0.0001 %"),
        (13.5, "1,350 %"),
    ],
)
def test_percent(share: float, text: str) -> None:
    assert percent(share) == text


def test_count() -> None:
    assert count(1234567) == "1,234,567"
    assert count(1, "tensor") == "1 tensor"
    assert count(0, "tensor") == "0 tensors"
    assert count(1000, "tensor") == "1,000 tensors"


def test_listed() -> None:
    assert listed([], 2) == ""
    assert listed(["a", "b"], 2) == "a, b"
    assert listed(["a", "b", "c\n"], 2) == "a, b and 1 more"
    assert listed(["c\n"], 2) == r"c\n"


def test_many_numbers_are_a_count_and_a_range() -> None:
    assert numbers([3, 1.5, 2], 2) == "3 numbers, 1.5 to 3"
    assert numbers({"a": 0.000123456, "b": 0, "c": -1}, 2) == "3 numbers, -1 to 0.0001235"
    assert numbers([3, 1.5, 2], 3) is None
    for other in ([1, 2, True], [1, 2, "3"], [1, 2, None], [1, 2, [3]], "123", 123, None):
        assert numbers(other, 2) is None


def test_printable_keeps_letters_and_escapes_the_rest() -> None:
    assert printable("wörter 重み ×") == "wörter 重み ×"
    assert printable("a\n\t\x1b[0m\x9b\u202e\u2028\ud800") == r"a\n\t\x1b[0m\x9b\u202e\u2028\ud800"

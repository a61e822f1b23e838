"""Headers read and written as columns by the compiled kernels: what the general parser and renderer give, or nothing."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from kernel_cases import native

from sparsedelta.dtypes import DTYPES
from sparsedelta.errors import FormatError
from sparsedelta.format.columns import starts
from sparsedelta.format.header_columns import (
    HeaderEntries,
    read_header_columns,
    render_header_columns,
)
from sparsedelta.format.records import TensorSpec
from sparsedelta.format.safetensors_header import HeaderEntry, parse_header, render_header

needs_kernels = pytest.mark.skipif(native is None, reason="the compiled kernels are not built")
pytestmark = needs_kernels

LAYOUTS = [
    TensorSpec(DTYPES[name], shape)
    for name, shape in (
        ("F32", (2, 3)), ("BF16", ()), ("I64", (7,)), ("BOOL", (0, 4)), ("F8_E4M3", (1, 1, 5)),
        ("F64", (1 << 20, 1 << 10)),
    )
]  # fmt: skip
PLAIN = "abcXYZ019._-/:é語😀\x7f\u2028 {}[],"
ODD = ('"', "\\", "\n", "\x00", "\x1f", "x" * 1025, "é" * 700, "__metadata__", "")
METADATA: tuple[Any, ...] = (None, {}, {"format": "pt"}, {"a": '"', "é": "\n😀"}, {"x": "}" * 40})
PIECES = (
    b'"', b"\\", b"{", b"}", b"[", b"]", b",", b":", b" ", b"\n", b"\x00", b"\xff", b"\xed\xa0\x80", b"0", b"-1", b"1.0",
    b"1e1", b"01", b"9223372036854775807", b"9223372036854775808", b"999999999999999999", b"18446744073709551616",
    b"null", b"{}", b'"\\u0061"', b"F32", b"f32", b'"dtype":"F32",', b'"data_offsets":[', b'"__metadata__":{},',
)  # fmt: skip


def drawn(draw: random.Random, *, odd: bool = False) -> tuple[Any, list[str], list[int]]:
    """Return metadata, and the name and layout of each tensor of a file."""
    n = draw.choice((64, 65, 70, 90))
    names = [f"{i}.{''.join(draw.choices(PLAIN, k=draw.randrange(9)))}" for i in range(n)]
    if odd:
        names[draw.randrange(n)] = draw.choice((*ODD, names[0]))
    n_layouts = draw.randrange(1, len(LAYOUTS) + 1)
    return draw.choice(METADATA), names, [draw.randrange(n_layouts) for _ in names]


def entries_of(names: list[str], layout: list[int]) -> list[HeaderEntry]:
    """Return the entries of tensors whose data follow each other."""
    specs = [LAYOUTS[one] for one in layout]
    at = starts(np.array([spec.n_bytes for spec in specs], np.int64)).tolist()
    return [
        HeaderEntry(name, spec.dtype.name, spec.shape, begin, end)
        for name, spec, begin, end in zip(names, specs, at, at[1:], strict=False)
    ]


def assert_same_or_none(raw: bytes) -> bool:
    """Return whether the header is read as columns; then the general parser must find the same in it."""
    columns = read_header_columns(raw)
    if columns is None:
        return False
    header = parse_header(raw, "it")
    entries = [*HeaderEntries(columns)]
    assert (columns.metadata, entries) == (header.metadata, [*header.entries])
    assert header.only_known_members
    assert render_header(columns.metadata, entries) == raw
    assert entries[0].begin == 0
    for one, other in itertools.pairwise(entries):
        assert one.end == other.begin
    for one in entries:
        assert one.end - one.begin == TensorSpec(DTYPES[one.dtype], one.shape).n_bytes
    return True


def edited(raw: bytes, draw: random.Random) -> bytes:
    """Return a header with a few edits at places where JSON has its marks and numbers."""
    text = bytearray(raw)
    marks = [at for at, one in enumerate(raw) if chr(one) in '"[]{},:0123456789']
    for _ in range(draw.choice((1, 1, 2, 4))):
        at = draw.choice((draw.choice(marks), draw.randrange(len(raw))))
        kind = draw.randrange(5)
        if kind == 0:
            text[at : at + draw.randrange(1, 4)] = b""
        elif kind == 1:
            text[at : at + draw.randrange(2)] = draw.choice(PIECES)
        elif kind == 2 and at < len(text):
            text[at] = draw.randrange(256)
        elif kind == 3:
            other = draw.choice(marks)
            text[at:at] = text[other : other + draw.randrange(1, 90)]
        elif text[at : at + 1].isdigit():
            text[at : at + 1] = b"%d" % draw.randrange(10)
    if draw.random() < 0.8:  # so that the padding is not what is wrong
        text = text.rstrip(b" ")
        text += b" " * (-len(text) % 8)
    return bytes(text)


@pytest.mark.parametrize("seed", range(4))
def test_a_canonical_header_is_read_and_written_as_columns(seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(60):
        metadata, names, layout = drawn(draw)
        entries = entries_of(names, layout)
        raw = render_header(metadata, entries)
        assert assert_same_or_none(raw)
        ends = np.array([entry.end for entry in entries], np.int64)
        assert render_header_columns(metadata, names, LAYOUTS, np.array(layout), ends) == raw


@pytest.mark.parametrize("seed", range(4))
def test_any_other_header_is_read_as_the_general_parser_does_or_not_at_all(seed: int) -> None:
    draw, n_read = random.Random(seed), 0
    for _ in range(25):
        metadata, names, layout = drawn(draw, odd=draw.random() < 0.3)
        entries = entries_of(names, layout)
        if draw.random() < 0.3:
            one, other = draw.sample(range(len(entries)), 2)
            entries[one], entries[other] = entries[other], entries[one]
        raw = render_header(metadata, entries)
        for _ in range(20):
            n_read += assert_same_or_none(edited(raw, draw))
    assert n_read  # some edits change only a letter of a name


@pytest.mark.parametrize("seed", range(4))
def test_names_with_escapes_are_left_to_the_general_renderer(seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(60):
        metadata, names, layout = drawn(draw, odd=True)
        entries = entries_of(names, layout)
        ends = np.array([entry.end for entry in entries], np.int64)
        found = render_header_columns(metadata, names, LAYOUTS, np.array(layout), ends)
        needs_escape = any(one in name for name in names for one in '"\\\n\x00\x1f')
        assert (found is None) == needs_escape
        unique = len({*names, "__metadata__"}) > len(names)
        assert found is None or not unique or found == render_header(metadata, entries)


def refused(work: Callable[..., Any], *arguments: Any) -> bool:
    """Return whether a kernel refuses its arguments, or leaves the work to other code."""
    try:
        return work(*arguments) is None
    except (ValueError, TypeError):
        return True


def test_hostile_arguments_are_refused() -> None:
    read, put = (getattr(native, name) for name in ("read_entries", "put_entries"))
    entries = entries_of([f"{i}" for i in range(64)], [0] * 64)
    raw = render_header(None, entries)
    table = np.empty((64, 3), np.int64)
    assert not refused(read, raw, 1, table)
    for start in (-1, 0, 2, len(raw), len(raw) + 1, 1 << 62, -(1 << 62)):
        assert refused(read, raw, start, table)
    for rows in (0, 1, 63, 65):
        assert refused(read, raw, 1, np.empty((rows, 3), np.int64))
    for end in range(0, len(raw) - 8, 7):
        assert refused(read, raw[:end], 1, table)
    names, texts = [entry.name for entry in entries], [b'F32","shape":[2,3]']
    layout, ends = np.zeros(64, np.int64), np.arange(24, 25 * 64, 24)[:64]
    assert not refused(put, names, texts, layout, ends)
    for wrong in (-1, 1, 1 << 31, 1 << 62, (1 << 63) - 1, -(1 << 63)):
        numbers = layout.copy()
        numbers[9] = wrong
        assert refused(put, names, texts, numbers, ends)
    for wrong in (-1, 0, -(1 << 63)):
        numbers = ends.copy()
        numbers[9] = wrong
        assert refused(put, names, texts, layout, numbers)
    for bad in (7, None, b"name", "\ud800", 'a"'):
        assert refused(put, [*names[:-1], bad], texts, layout, ends)
    for bad in ("text", None, 3):
        assert refused(put, names, [bad], layout, ends)
    assert refused(put, names[:-1], texts, layout, ends)
    assert refused(put, names, texts, layout, ends[:-1])


def test_many_dimensions_and_long_numbers_are_left_to_the_general_parser() -> None:
    entries = entries_of([f"{i}" for i in range(64)], [3] * 64)
    raw = render_header(None, entries)
    for shape in (b"[0" + b",1" * 64 + b"]", b"[0,1000000000000000000]", b"[00,4]", b"[0,-1]"):
        other = raw.rstrip(b" ").replace(b"[0,4]", shape)
        other += b" " * (-len(other) % 8)
        assert read_header_columns(other) is None
        if shape in (b"[00,4]", b"[0,-1]"):
            with pytest.raises(FormatError):
                parse_header(other, "it")

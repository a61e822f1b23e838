"""Comparing one tensor: the exact changes and both digests, for any size of blocks and chunks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blake3 import blake3
from helpers import Raw, noise, small_chunks, write_file

from sparsedelta.codecs.chunk import decode_chunk, touched_digest
from sparsedelta.codecs.values import VALUE_ENCODINGS
from sparsedelta.dtypes import DTYPES
from sparsedelta.files.checkpoint import Checkpoint
from sparsedelta.format.records import Row, TensorSpec, default_keep
from sparsedelta.format.spool import SpoolPayload
from sparsedelta.progress import Silent
from sparsedelta.tensors.compare import Comparison, digest_tensor
from sparsedelta.tensors.parallel import Pace
from sparsedelta.tensors.rebuild import rebuild
from sparsedelta.tensors.sources import RebuiltTensor


class Counter(Silent):
    total = 0

    def advance(self, n_bytes: int) -> None:
        self.total += n_bytes


def digest(tensor: Raw) -> bytes:
    return blake3(tensor.data).digest()[:16]


def compare(
    tmp_path: Path, base: Raw | None, target: Raw, values: str = "ulp"
) -> tuple[Row, SpoolPayload, int]:
    """Return the result of a comparison, its coded chunks, and the number of bytes reported as progress."""
    payload, counter = SpoolPayload(), Counter()
    old = write_file(tmp_path / "base", {} if base is None else {"t": base})
    new = write_file(tmp_path / "target", {"t": target})
    with Checkpoint(old) as before, Checkpoint(new) as after:
        comparison = Comparison(
            before.tensors.get(("base", "t")),
            after.tensors["target", "t"],
            values=values,
            payload=payload,
            pace=Pace(counter),
        )
        return comparison.run(), payload, counter.total


def decoded(row: Row, payload: SpoolPayload, before: Any) -> list[tuple[int, int]]:
    """Return the touched positions and the bits after the change, decoded chunk by chunk."""
    found, dtype, end = [], row.target.dtype, 0
    for chunk in row.chunks:
        assert chunk.start >= end
        end = chunk.end
        coded = payload.read(chunk.offset, chunk.stored_bytes)
        positions, codes = decode_chunk(chunk, dtype, coded)
        flat = positions.astype(np.int64) + chunk.start
        bits = VALUE_ENCODINGS[chunk.coding.values].decode(dtype, before[flat], codes)
        assert chunk.touched == (touched_digest(before[flat]), touched_digest(bits))
        found += list(zip(flat.tolist(), bits.tolist(), strict=True))
    assert end <= row.target.n_elements
    return found


@pytest.mark.parametrize(("chunk", "block"), [(1 << 24, 1 << 19), (10, 16), (7, 8), (1, 16)])
@pytest.mark.parametrize("values", ["ulp", "target"])
def test_changes_are_found(
    values: str, chunk: int, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_chunks(monkeypatch, chunk, block)
    base = noise("I16", 40)
    target = base.changed(0, 5, 6, 7, 38, 79)
    row, payload, n_bytes = compare(tmp_path, base, target, values)
    before, after = (np.frombuffer(t.data, "<u2") for t in (base, target))
    assert decoded(row, payload, before) == [(i, int(after[i])) for i in [0, 2, 3, 19, 39]]
    assert all(c.span == min(chunk, 40 - c.start) for c in row.chunks)
    assert (row.keep, row.nnz) == (40, 5)
    assert {c.coding.values for c in row.chunks} == {values}
    assert (row.file, row.name) == ("target", "t")
    assert row.base is not None
    assert (row.base.file, row.base.name) == ("base", "t")
    assert row.base.spec.digest == digest(base)
    assert row.target.digest == digest(target)
    assert n_bytes == len(base.data) + len(target.data)


@pytest.mark.parametrize(
    ("base", "target", "keep", "touched"),
    [
        (None, Raw("U8", (3,), b"\0\5\0"), 0, [1]),
        (None, Raw("U8", (3,), bytes(3)), 0, []),
        (Raw("U8", (3,), b"\1\2\3"), Raw("I8", (3,), b"\1\0\3"), 0, [0, 2]),
        (Raw("U8", (3,), b"\1\2\3"), Raw("U8", (5,), b"\1\2\4\0\5"), 3, [2, 4]),
        (Raw("U8", (3,), b"\1\2\3"), Raw("U8", (2,), b"\1\2"), 2, []),
        (Raw("U8", (2, 3), bytes(6)), Raw("U8", (3, 2), bytes(6)), 6, []),
        (Raw("U8", (0,), b""), Raw("U8", (1,), b"\7"), 0, [0]),
        (Raw("U8", (3,), b"\1\2\3"), Raw("U8", (0,), b""), 0, []),
        (Raw("X24", (2,), b"\1\2\3\4\5\6"), Raw("X24", (1,), b"\1\0\3"), 3, [1]),
        (Raw("X24", (1,), b"\1\2\3"), Raw("X8_NEW", (3,), b"\1\2\3"), 0, [0, 1, 2]),
    ],
)
@pytest.mark.parametrize("block", [8, 1 << 19])
def test_structure_changes(
    base: Raw | None,
    target: Raw,
    keep: int,
    touched: list[int],
    block: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    small_chunks(monkeypatch, 2, block)
    row, payload, _ = compare(tmp_path, base, target)
    assert row.keep == keep
    before = np.zeros(len(target.data), np.uint8)
    if base is not None and keep:
        before[:keep] = np.frombuffer(base.data, np.uint8)[:keep]
    assert decoded(row, payload, before) == [(i, target.data[i]) for i in touched]
    # A base tensor that the row does not use is not named.
    assert (row.base and row.base.spec.digest) == (digest(base) if base and keep else None)
    assert row.target.digest == digest(target)
    # Chunks after the last element of the base hold new values.
    assert [c.coding.values for c in row.chunks] == [
        "ulp" if c.start < keep else "target" for c in row.chunks
    ]


@pytest.mark.parametrize("n", [0, 1, 1000])
def test_equal_tensors_are_copied(n: int, tmp_path: Path) -> None:
    row, _, _ = compare(tmp_path, noise("F32", n), noise("F32", n))
    assert row.is_copied
    assert row.base is not None
    assert row.base.spec.digest == row.target.digest == digest(noise("F32", n))


def test_dense_chunks_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []

    class Place:
        def __enter__(self) -> None:
            taken.append("in")

        def __exit__(self, *exc: object) -> None:
            taken.append("out")

    small_chunks(monkeypatch, 100, 16)
    monkeypatch.setattr("sparsedelta.tensors.compare.DENSE_ELEMENTS", 50)
    monkeypatch.setattr("sparsedelta.tensors.changes.DENSE_ELEMENTS", 50)
    monkeypatch.setattr("sparsedelta.tensors.changes.dense_places", Place())
    base = Raw("U8", (300,), bytes(300))
    target = Raw("U8", (300,), b"\1" * 50 + bytes(50) + b"\1" * 51 + bytes(49) + b"\1" * 100)
    row, payload, _ = compare(tmp_path, base, target)
    assert row.nnz == 201
    assert taken == ["in", "out"] * 2  # the first chunk has no more than 50
    made = bytearray(300)
    with Checkpoint(tmp_path / "base") as checkpoint:
        rebuild(
            row,
            checkpoint.tensors["base", "t"],
            payload,
            lambda data, offset: made.__setitem__(slice(offset, offset + len(data)), data),
            check="full",
            pace=Pace(Silent()),
        )
    assert made == target.data
    assert taken == ["in", "out"] * 4


def test_digest_of_the_rest_of_a_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_chunks(monkeypatch, 1 << 24, 8)
    tensor = noise("U8", 50)
    with Checkpoint(write_file(tmp_path / "f", {"t": tensor})) as checkpoint:
        opened, pace = checkpoint.tensors["f", "t"], Pace(Silent())
        assert digest_tensor(opened, pace) == digest(tensor)
        begun = blake3(tensor.data[:13])
        assert digest_tensor(opened, pace, offset=13, hasher=begun) == digest(tensor)
        assert (
            digest_tensor(opened, pace, offset=50, hasher=blake3(b"x"))
            == blake3(b"x").digest()[:16]
        )


class Zeros:
    """A tensor in which only one element is not zero (a ``Source``)."""

    file, name = "f", "w"

    def __init__(self, n: int, other: int | None = None) -> None:
        self.spec = TensorSpec(DTYPES["U8"], (n,))
        self.other = other

    def read_into(self, buffer: memoryview, offset: int) -> None:
        block = np.frombuffer(buffer, np.uint8)
        block[:] = 0
        if self.other is not None and offset <= self.other < offset + len(block):
            block[self.other - offset] = 7


@pytest.mark.slow
def test_one_element_beyond_2_31() -> None:
    n, pace, payload = (1 << 31) + 100, Pace(Silent()), SpoolPayload()
    base, found = Zeros(n), []
    row = Comparison(base, Zeros(n, n - 2), values="ulp", payload=payload, pace=pace).run()
    (chunk,) = row.chunks
    assert (chunk.start, chunk.span, chunk.nnz) == (1 << 31, 100, 1)

    def write(data: memoryview, offset: int) -> None:
        if offset + len(data) > n - 2:
            found.append((offset, bytes(data)))

    rebuild(row, base, payload, write, check="full", pace=pace)
    ((offset, last),) = found
    assert offset + len(last) == n
    assert last == bytes(len(last) - 2) + b"\7\0"
    buffer = bytearray(100)
    RebuiltTensor(row, base, payload, pace).read_into(memoryview(buffer), 1 << 31)
    assert buffer == bytes(98) + b"\7\0"


def test_kept_elements(tmp_path: Path) -> None:
    tensors = {"a": noise("F32", 3, 4), "b": noise("F32", 5), "c": noise("I32", 5)}
    with Checkpoint(write_file(tmp_path / "f", tensors)) as checkpoint:
        a, b, c = (checkpoint.tensors["f", name].spec for name in "abc")
        assert default_keep(a, b) == default_keep(b, a) == 5
        assert default_keep(None, b) == 0
        assert default_keep(b, c) == 0

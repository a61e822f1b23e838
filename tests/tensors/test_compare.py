"""Comparing one tensor: exactly what changed, digests of both sides, whatever the blocks and chunks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blake3 import blake3
from helpers import Raw, noise, small_chunks, write_file

from sparsedelta.codecs.chunk import chunk_span, decode_chunk
from sparsedelta.codecs.values import VALUE_ENCODINGS
from sparsedelta.dtypes import DTYPES
from sparsedelta.files.checkpoint import Checkpoint
from sparsedelta.format.records import tensor_key
from sparsedelta.format.spool import SpoolPayload
from sparsedelta.progress import Silent
from sparsedelta.tensors import parallel
from sparsedelta.tensors.compare import Compared, Comparison, digest_tensor, kept_elements
from sparsedelta.tensors.parallel import Pace


class Counter(Silent):
    total = 0

    def advance(self, n_bytes: int) -> None:
        self.total += n_bytes


def compare(
    tmp_path: Path, base: Raw | None, target: Raw, values: str = "ulp"
) -> tuple[Compared, SpoolPayload, int]:
    """Return what comparing finds, its coded chunks, and how many bytes it reported."""
    payload, counter = SpoolPayload(), Counter()
    old = write_file(tmp_path / "base", {} if base is None else {"t": base})
    new = write_file(tmp_path / "target", {"t": target})
    with Checkpoint(old) as before, Checkpoint(new) as after:
        comparison = Comparison(
            before.tensors.get("t"),
            after.tensors["t"],
            values=values,
            payload=payload,
            pace=Pace(counter),
        )
        return comparison.run(), payload, counter.total


def decoded(compared: Compared, payload: SpoolPayload, before: Any) -> list[tuple[int, int]]:
    """Return the touched positions and the bits there after the change."""
    row, found, offset = compared.row, [], 0
    assert row.change is not None
    assert row.target is not None
    for chunk in row.change.chunks:
        n_bytes = sum(chunk.coded_bytes)
        coded = payload.read(tensor_key("t"), offset, n_bytes)
        span = chunk_span(row.target.n_elements, chunk.number)
        positions, codes = decode_chunk(chunk, row.target.dtype, span, coded)
        first = chunk.number * chunk_span(1 << 62, 0)
        flat = positions.astype(np.int64) + first
        bits = VALUE_ENCODINGS[row.change.values].decode(row.target.dtype, before[flat], codes)
        found += list(zip(flat.tolist(), bits.tolist(), strict=True))
        offset += n_bytes
    assert offset == payload.n_bytes(tensor_key("t"))
    return found


@pytest.mark.parametrize(("chunk", "block"), [(1 << 24, 1 << 19), (10, 16), (7, 8), (1, 16)])
@pytest.mark.parametrize("values", ["ulp", "target"])
def test_changes_are_found(
    values: str, chunk: int, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_chunks(monkeypatch, chunk, block)
    base = noise("I16", 40)
    target = base.changed(0, 5, 6, 7, 38, 79)
    compared, payload, n_bytes = compare(tmp_path, base, target, values)
    before, after = (np.frombuffer(t.data, "<u2") for t in (base, target))
    touched = [0, 2, 3, 19, 39]
    assert decoded(compared, payload, before) == [(i, int(after[i])) for i in touched]
    change = compared.row.change
    assert change is not None
    assert (change.keep, change.values, change.nnz) == (40, values, 5)
    assert change.touched == tuple(
        blake3(bits[touched].tobytes()).digest()[:8] for bits in (before, after)
    )
    assert compared.base_digest == blake3(base.data).digest()
    assert compared.target_digest == blake3(target.data).digest()
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
    compared, payload, _ = compare(tmp_path, base, target)
    change = compared.row.change
    assert change is not None
    assert change.keep == keep
    before = np.zeros(len(target.data), np.uint8)
    if base is not None and keep:
        before[:keep] = np.frombuffer(base.data, np.uint8)[:keep]
    assert decoded(compared, payload, before) == [(i, target.data[i]) for i in touched]
    assert compared.base_digest == (None if base is None else blake3(base.data).digest())
    assert compared.target_digest == blake3(target.data).digest()
    assert change.values == ("ulp" if keep else "target")


@pytest.mark.parametrize("n", [0, 1, 1000])
def test_equal_tensors_have_no_change(n: int, tmp_path: Path) -> None:
    compared, payload, _ = compare(tmp_path, noise("F32", n), noise("F32", n))
    assert compared.row.change is None
    assert compared.base_digest == compared.target_digest == blake3(noise("F32", n).data).digest()
    assert payload.n_bytes(tensor_key("t")) == 0


def test_dense_chunks_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []

    class Place:
        def __enter__(self) -> None:
            taken.append("in")

        def __exit__(self, *exc: object) -> None:
            taken.append("out")

    small_chunks(monkeypatch, 100, 16)
    for module in ("sparsedelta.tensors.compare", "sparsedelta.tensors.rebuild"):
        monkeypatch.setattr(f"{module}.DENSE_ELEMENTS", 50)
        monkeypatch.setattr(f"{module}.dense_places", Place())
    base = Raw("U8", (300,), bytes(300))
    target = Raw("U8", (300,), b"\1" * 50 + bytes(50) + b"\1" * 51 + bytes(49) + b"\1" * 100)
    compared, _, _ = compare(tmp_path, base, target)
    assert compared.row.change is not None
    assert compared.row.change.nnz == 201
    assert taken == ["in", "out"] * 2  # the first chunk has no more than 50
    assert parallel.dense_places is not None


def test_digest_of_the_rest_of_a_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_chunks(monkeypatch, 1 << 24, 8)
    tensor = noise("U8", 50)
    with Checkpoint(write_file(tmp_path / "f", {"t": tensor})) as checkpoint:
        opened, pace = checkpoint.tensors["t"], Pace(Silent())
        assert digest_tensor(opened, pace) == blake3(tensor.data).digest()
        begun = blake3(tensor.data[:13])
        assert digest_tensor(opened, pace, offset=13, hasher=begun) == blake3(tensor.data).digest()
        assert digest_tensor(opened, pace, offset=50, hasher=blake3(b"x")) == blake3(b"x").digest()


def test_kept_elements(tmp_path: Path) -> None:
    tensors = {"a": noise("F32", 3, 4), "b": noise("F32", 5), "c": noise("I32", 5)}
    with Checkpoint(write_file(tmp_path / "f", tensors)) as checkpoint:
        a, b, c = (checkpoint.tensors[name] for name in "abc")
        assert kept_elements(a, b) == kept_elements(b, a) == 5
        assert kept_elements(None, b) == 0
        assert kept_elements(b, c) == 0
    assert DTYPES["F32"].width == DTYPES["I32"].width

"""Chunks that begin at any element: reading by window, rebuilding and checking of rows built by hand."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st
from strategies import relaxed

from sparsedelta.codecs.chunk import Span, check_chunk, encode_chunk, touched_digest
from sparsedelta.codecs.values import VALUE_ENCODINGS
from sparsedelta.dtypes import DTYPES
from sparsedelta.errors import BaseNeeded, Corrupt
from sparsedelta.format.records import BaseTensor, Row, TensorSpec
from sparsedelta.format.spool import SpoolPayload
from sparsedelta.progress import Silent
from sparsedelta.tensors import rebuild as rebuild_module
from sparsedelta.tensors.changes import ChangeReader, segments
from sparsedelta.tensors.parallel import Pace
from sparsedelta.tensors.rebuild import BaseDiffers, Check, rebuild
from sparsedelta.tensors.sources import RebuiltTensor
from sparsedelta.tensors.start import RowStart

Bits = npt.NDArray[np.uint16]
BF16 = DTYPES["BF16"]
PACE = Pace(Silent())


class InMemory:
    """A tensor in memory (a ``Source``)."""

    file, name = "base", "w"

    def __init__(self, bits: Bits) -> None:
        self.raw = bits.tobytes()
        self.spec = TensorSpec(BF16, (len(bits),), digest(bits))

    def read_into(self, buffer: memoryview, offset: int) -> None:
        buffer[:] = self.raw[offset : offset + len(buffer)]


def digest(bits: Bits) -> bytes:
    return blake3(bits.tobytes()).digest()[:16]


def row_of(
    before: Bits,
    after: Bits,
    borders: Sequence[tuple[int, int]],
    payload: SpoolPayload,
    *,
    values: Sequence[str] = ("ulp", "target"),
    touched: bool = True,
    classes: bool = False,
) -> Row:
    """Return the row from one array to another, with one chunk for each (start, end) that contains a change.

    Args:
        before: the base tensor; what it has too few elements of is zero.
        after: the target tensor.
        borders: of the chunks; together they hold all changes.
        payload: receives their streams.
        values: value encodings, used in turn.
        touched: state touched digests.
        classes: let the encoder use what was before.
    """
    keep = min(len(before), len(after))
    start = np.zeros_like(after)
    start[:keep] = before[:keep]
    base = InMemory(before)
    chunks = []
    for (first, end), code in zip(borders, itertools.cycle(values)):
        end = min(end, len(after))
        positions = np.flatnonzero(start[first:end] != after[first:end]).astype(np.uint32)
        if not len(positions):
            continue
        old, new = start[first:end][positions], after[first:end][positions]
        reader = RowStart(base, BF16, keep, first) if classes else None
        chunk, streams = encode_chunk(
            Span(first, end - first, before=reader),
            positions,
            VALUE_ENCODINGS[code].encode(BF16, old, new),
            values=code,
            touched=(touched_digest(old), touched_digest(new)) if touched else None,
        )
        check_chunk(chunk, BF16, len(after))
        chunks.append(payload.add_chunk(chunk, streams))
    spec = TensorSpec(BF16, (len(after),), digest(after))
    return Row("target", "w", spec, BaseTensor("base", "w", base.spec), keep, tuple(chunks))


def made(row: Row, base: InMemory | None, payload: SpoolPayload, check: Check = "full") -> Bits:
    """Return the tensor that ``rebuild`` writes; check that it writes in order and without gaps."""
    out = bytearray()

    def write(data: memoryview, offset: int) -> None:
        assert offset == len(out)
        out.extend(data)

    rebuild(row, base, payload, write, check=check, pace=PACE)
    return np.frombuffer(bytes(out), "<u2")


def changed(before: Bits, positions: Sequence[int]) -> Bits:
    after = before.copy()
    after[list(positions)] += np.uint16(3)
    return after


BEFORE = np.arange(1000, 1050, dtype="<u2")
AFTER = changed(BEFORE, [0, 6, 7, 19, 20, 31, 49])
BORDERS = {
    "one": [(0, 50)],
    "tight": [(0, 1), (6, 8), (19, 21), (31, 32), (49, 50)],
    "with holes": [(0, 5), (5, 7), (7, 20), (20, 22), (30, 50)],
    "odd": [(0, 7), (7, 13), (13, 32), (49, 50)],
}


@pytest.fixture(params=BORDERS)
def row_and_payload(request: pytest.FixtureRequest) -> tuple[Row, SpoolPayload]:
    payload = SpoolPayload()
    return row_of(BEFORE, AFTER, BORDERS[request.param], payload), payload


def test_every_window(row_and_payload: tuple[Row, SpoolPayload]) -> None:
    row, payload = row_and_payload
    for start in range(51):
        for n in (0, 1, 2, 13, 50 - start):
            bits = BEFORE[start : start + n].copy()
            for piece in ChangeReader(row, payload, PACE).window(start, len(bits)):
                assert len(piece.positions) == len(piece.codes) > 0
                piece.apply(BF16, bits)
            assert bits.tolist() == AFTER[start : start + n].tolist()


def test_windows_in_any_order_and_each_chunk_decoded_once_in_ascending_order(
    row_and_payload: tuple[Row, SpoolPayload], monkeypatch: pytest.MonkeyPatch
) -> None:
    row, payload = row_and_payload
    read: list[int] = []
    original = payload.read

    def counting(offset: int, n_bytes: int) -> bytes:
        read.append(offset)
        return original(offset, n_bytes)

    monkeypatch.setattr(payload, "read", counting)
    reader = ChangeReader(row, payload, PACE)
    for start in range(0, 50, 3):
        reader.window(start, min(3, 50 - start))
    assert len(read) <= len(row.chunks) + 16  # again only where windows meet two chunks
    for start in (40, 0, 20, 6):
        bits = BEFORE[start : start + 10].copy()
        for piece in reader.window(start, 10):
            piece.apply(BF16, bits)
        assert bits.tolist() == AFTER[start : start + 10].tolist()


@pytest.mark.parametrize("block", [2, 6, 1 << 19])
def test_rebuilt(
    block: int, row_and_payload: tuple[Row, SpoolPayload], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rebuild_module, "BLOCK_BYTES", block)
    row, payload = row_and_payload
    for check in ("full", "touched", "none"):
        assert made(row, InMemory(BEFORE), payload, check).tolist() == AFTER.tolist()


def test_a_made_tensor_is_read_in_any_pieces(row_and_payload: tuple[Row, SpoolPayload]) -> None:
    row, payload = row_and_payload
    tensor = RebuiltTensor(row, InMemory(BEFORE), payload, PACE)
    assert (tensor.file, tensor.name, tensor.spec) == ("target", "w", row.target)
    for n in (1, 4, 17, 50):
        for start in [*range(0, 50, n), 0]:
            buffer = bytearray(2 * min(n, 50 - start))
            tensor.read_into(memoryview(buffer), 2 * start)
            assert buffer == AFTER[start : start + n].tobytes()


def test_a_made_tensor_may_be_the_base_of_another_with_other_borders() -> None:
    third = changed(AFTER, [0, 1, 20, 33, 48])
    for one, other in itertools.product(
        BORDERS.values(), [[(0, 50)], [(0, 2), (20, 34), (48, 49)]]
    ):
        payload = SpoolPayload()
        first = RebuiltTensor(row_of(BEFORE, AFTER, one, payload), InMemory(BEFORE), payload, PACE)
        second = RebuiltTensor(row_of(AFTER, third, other, payload), first, payload, PACE)
        buffer = bytearray(100)
        second.read_into(memoryview(buffer), 0)
        assert buffer == third.tobytes()


def test_changes_of_one_tensor_in_two_deltas() -> None:
    payload = SpoolPayload()
    low, high = changed(BEFORE, [0, 6, 30]), changed(BEFORE, [5, 31, 49])
    row = row_of(BEFORE, low, [(0, 7), (7, 50)], payload)
    other = row_of(BEFORE, high, [(5, 6), (30, 50)], payload)
    tensor = RebuiltTensor(row, InMemory(BEFORE), payload, PACE, others=[(other, payload)])
    buffer = bytearray(100)
    tensor.read_into(memoryview(buffer), 0)
    assert buffer == changed(BEFORE, [0, 6, 30, 5, 31, 49]).tobytes()


@pytest.mark.parametrize("n_after", [20, 50, 77])
def test_what_the_base_lacks_starts_as_zeros(n_after: int) -> None:
    payload = SpoolPayload()
    after = np.zeros(n_after, "<u2")
    after[:50] = AFTER[:n_after]
    after[60:70] = 7
    row = row_of(BEFORE, after, [(0, 7), (7, 33), (33, 61), (61, 77)], payload)
    assert row.keep == min(50, n_after)
    assert made(row, InMemory(BEFORE), payload).tolist() == after.tolist()
    tensor, buffer = RebuiltTensor(row, InMemory(BEFORE), payload, PACE), bytearray(2 * n_after)
    for start in range(0, n_after, 5):
        tensor.read_into(memoryview(buffer)[2 * start : 2 * start + 10], 2 * start)
    assert buffer == after.tobytes()


def test_segments_cover_the_tensor() -> None:
    row = row_of(BEFORE, AFTER, BORDERS["with holes"], SpoolPayload())
    parts = list(segments(row))
    assert [begin for begin, *_ in parts] == [0, *(end for _, end, _ in parts[:-1])]
    assert parts[-1][1] == 50
    assert [chunk for *_, chunk in parts if chunk] == list(row.chunks)
    assert list(segments(replace(row, chunks=()))) == [(0, 50, None)]


def test_another_base_is_told_from_a_damaged_delta() -> None:
    payload = SpoolPayload()
    row = row_of(BEFORE, AFTER, BORDERS["odd"], payload)
    for touched_element in (0, 6, 31):
        other = InMemory(changed(BEFORE, [touched_element]))
        for check in ("full", "touched"):
            with pytest.raises(BaseDiffers) as caught:
                made(row, other, payload, check)
            assert caught.value.digest == other.spec.digest
        made(row, other, payload, "none")
    untouched = InMemory(changed(BEFORE, [10]))
    made(row, untouched, payload, "touched")  # sees touched elements only
    with pytest.raises(BaseDiffers):
        made(row, untouched, payload)


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("side", [0, 1])
def test_every_chunk_has_touched_digests_of_its_own(number: int, side: int) -> None:
    payload = SpoolPayload()
    row = row_of(BEFORE, AFTER, BORDERS["odd"], payload)
    chunk = row.chunks[number]
    assert chunk.touched is not None
    wrong = [*chunk.touched]
    wrong[side] = bytes(8)
    chunks = [*row.chunks]
    chunks[number] = replace(chunk, touched=(wrong[0], wrong[1]))
    row = replace(row, chunks=tuple(chunks))
    for check in ("full", "touched"):
        with pytest.raises(Corrupt, match="the base is right, so the delta is inconsistent"):
            made(row, InMemory(BEFORE), payload, check)
    made(row, InMemory(BEFORE), payload, "none")


def test_without_touched_digests_all_bytes_are_checked() -> None:
    payload = SpoolPayload()
    row = row_of(BEFORE, AFTER, BORDERS["odd"], payload, touched=False)
    assert made(row, InMemory(BEFORE), payload, "touched").tolist() == AFTER.tolist()
    with pytest.raises(BaseDiffers):
        made(row, InMemory(changed(BEFORE, [10])), payload, "touched")
    wrong = replace(row, target=row.target.with_digest(bytes(16)))
    with pytest.raises(Corrupt, match="the base is right, so"):
        made(wrong, InMemory(BEFORE), payload, "touched")


def test_classes_are_read_with_the_start_alone() -> None:
    draw = np.random.default_rng(1)
    n = 1 << 16
    before = (draw.normal(0, 0.02, n).astype("<f4").view("<u4") >> 16).astype("<u2")
    small = (before >> 7 & 255) < 119
    after = before.copy()
    after[small & (draw.random(n) < 0.5)] += np.uint16(1)
    payload = SpoolPayload()
    borders = [(1, 20_001), (20_001, 45_000), (45_000, n)]
    row = row_of(before, after, [(0, 1), *borders], payload, values=["ulp"], classes=True)
    assert any(chunk.coding.classes for chunk in row.chunks)
    assert made(row, InMemory(before), payload).tolist() == after.tolist()
    with pytest.raises(BaseNeeded):
        ChangeReader(row, payload, PACE).window(0, n)
    with pytest.raises(BaseDiffers):
        made(row, InMemory(after), payload)
    # After the kept elements the start is zeros, so no base is needed.
    beyond = replace(row, keep=0, base=None, chunks=row.chunks[-1:])
    with contextlib.suppress(Corrupt):
        ChangeReader(beyond, payload, PACE).window(0, n)


def test_a_row_with_a_base_is_not_made_without_it() -> None:
    payload = SpoolPayload()
    row = row_of(BEFORE, AFTER, [(0, 50)], payload)
    with pytest.raises(ValueError, match="needs its base tensor"):
        made(row, None, payload)


def test_damaged_streams_name_their_tensor() -> None:
    payload = SpoolPayload()
    row = row_of(BEFORE, AFTER, [(0, 50)], payload)
    other = replace(row, chunks=(replace(row.chunks[0], digest=bytes(16)),))
    with pytest.raises(Corrupt, match="'w': a chunk of the delta is damaged") as caught:
        made(other, InMemory(BEFORE), payload)
    assert caught.value.tensor == "w"


@relaxed(60)
@given(st.data())
def test_any_borders_make_the_same(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 40))
    before = np.array(data.draw(st.lists(st.integers(0, 9), min_size=n, max_size=n)), "<u2")
    after = np.array(data.draw(st.lists(st.integers(0, 9), min_size=n, max_size=n)), "<u2")
    cuts = sorted(data.draw(st.sets(st.integers(1, n), max_size=6)) | {0, n})
    payload = SpoolPayload()
    row = row_of(before, after, list(itertools.pairwise(cuts)), payload)
    base = InMemory(before)
    assert made(row, base, payload).tolist() == after.tolist()
    tensor, buffer = RebuiltTensor(row, base, payload, PACE), bytearray(2 * n)
    step = data.draw(st.integers(1, n))
    for start in range(0, n, step):
        tensor.read_into(memoryview(buffer)[2 * start : 2 * (start + step)], 2 * start)
    assert buffer == after.tobytes()

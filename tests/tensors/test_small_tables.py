"""The compiled kernels for many small tensors on random and hostile tables: wrong rows are marked, right ones are right."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from blake3 import blake3
from kernel_cases import drawn, encoded, native

from sparsedelta.codecs.chunk import Span, touched_digest
from sparsedelta.codecs.values import change
from sparsedelta.codecs.zstd import Level
from sparsedelta.dtypes import DTYPES
from sparsedelta.tensors.small import INDICES, PACKINGS

pytestmark = pytest.mark.skipif(native is None, reason="the compiled kernels are not built")

Table = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]
COLUMNS = (
    "base_at out_at n_bytes width base_digest target_digest coded_at start span nnz kind index packing first_stored"
    " coded_digest touched_digest"
).split()
EXTREMES = [
    -(1 << 63),
    -(1 << 62),
    -2,
    -1,
    0,
    1,
    2,
    3,
    7,
    8,
    16,
    1 << 20,
    1 << 31,
    1 << 61,
    1 << 62,
    (1 << 63) - 1,
]
DTYPE_OF = {1: "I8", 2: "BF16", 4: "F32", 8: "F64"}
FILL = 0xA5  # what the output holds before


@dataclass
class Case:
    """Arguments of ``rebuild_small`` that are right, and the target that they rebuild."""

    base: Bytes
    payload: Bytes
    digests: Bytes
    stored: Table
    table: Table
    target: Bytes


def make_case(seed: int) -> Case:
    """Return a case of a few tensors; some have no base, some no change."""
    draw = random.Random(seed)
    base, payload, digests, target = bytearray(b"?" * 5), bytearray(), bytearray(), bytearray()
    stored: list[int] = []
    rows = []

    def digest(data: Any, n: int = 16) -> int:
        digests.extend(blake3(bytes(data)).digest()[:n])
        return len(digests) - n

    for number in range(draw.randrange(1, 9)):
        width = draw.choice((1, 2, 4, 8))
        dtype = DTYPES[DTYPE_OF[width]]
        positions, codes, before = drawn(1000 * seed + number, width, (1, 63, 64, 65, 700))
        has_base = draw.random() < 0.8
        if not has_base:
            before = np.zeros_like(before)
        row = dict.fromkeys(COLUMNS, -1) | {"n_bytes": before.nbytes, "width": width}
        row["out_at"] = len(target)
        if has_base:
            row |= {"base_at": len(base), "base_digest": digest(before.tobytes())}
            base += before.tobytes()
        after = before.copy()
        if draw.random() < 0.8:
            chunk, streams = encoded(Span(0, len(before)), positions, codes, Level.FAST)
            coding = chunk.coding
            if coding.index in INDICES and coding.packing in PACKINGS and len(chunk.stored) <= 9:
                old, new = change(dtype, after, 0, positions, "ulp", codes)
                row |= {"coded_at": len(payload), "start": 0, "span": len(before), "nnz": chunk.nnz}
                row |= {"kind": 1 + dtype.is_float, "index": INDICES[coding.index]}
                row |= {"packing": PACKINGS[coding.packing], "first_stored": len(stored)}
                row["coded_digest"] = digest(streams)
                digests.extend(touched_digest(old) + touched_digest(new))
                row["touched_digest"] = len(digests) - 16
                payload += streams
                stored.extend(chunk.stored)
        row["target_digest"] = digest(after.tobytes())
        target += after.tobytes()
        rows.append([row[name] for name in COLUMNS])
    parts = (np.frombuffer(bytes(one), np.uint8) for one in (base, payload, digests, target))
    base_array, payload_array, digest_array, target_array = parts
    sizes, table = np.array(stored, np.int64), np.array(rows, np.int64)
    return Case(base_array, payload_array, digest_array, sizes, table, target_array)


def run(case: Case, table: Table) -> tuple[Bytes, list[int]]:
    """Return the output, and the flag of each row."""
    out, good = np.full(len(case.target), FILL, np.uint8), np.full(len(table), 7, np.uint8)
    native.rebuild_small(case.base, case.payload, case.digests, case.stored, table, out, good)  # type: ignore[union-attr]
    return out, good.tolist()


def ranges(table: Table, at: str, size: str = "n_bytes") -> Iterator[tuple[int, int]]:
    """Yield where each row's bytes begin and end."""
    for row in table.tolist():
        yield row[COLUMNS.index(at)], row[COLUMNS.index(at)] + row[COLUMNS.index(size)]


def is_unchanged(row: list[int]) -> bool:
    """Return whether a row has no chunk, whose streams could be compressed."""
    return row[COLUMNS.index("coded_at")] < 0


@pytest.mark.parametrize("seed", range(60))
def test_right_rows_are_rebuilt(seed: int) -> None:
    case = make_case(seed)
    out, good = run(case, case.table)
    for flag, (begin, end), row in zip(
        good, ranges(case.table, "out_at"), case.table.tolist(), strict=True
    ):
        if flag:
            assert out[begin:end].tobytes() == case.target[begin:end].tobytes()
        else:  # a compressed stream is left to other code
            assert not is_unchanged(row)


def test_most_rows_with_changes_are_rebuilt() -> None:
    flags = []
    for seed in range(60):
        case = make_case(seed)
        _, good = run(case, case.table)
        changed = case.table[:, COLUMNS.index("coded_at")] >= 0
        flags += [flag for flag, one in zip(good, changed, strict=True) if one]
    assert sum(flags) > 0.8 * len(flags) > 100


@pytest.mark.parametrize("seed", range(60))
def test_wrong_rows_are_marked_and_nothing_else_is_written(seed: int) -> None:
    case, draw = make_case(seed), random.Random(seed)
    _, usual = run(case, case.table)
    for _ in range(60):
        table = case.table.copy()
        wrong = set()
        for _ in range(draw.choice((1, 1, 2, 6))):
            row, column = draw.randrange(len(table)), draw.randrange(len(COLUMNS))
            near = int(case.table[row, column]) + draw.choice((-1, 1, 8, -8))
            other = int(case.table[draw.randrange(len(table)), column])
            table[row, column] = draw.choice((*EXTREMES, near, near, other))
            wrong.add(row)
        out, good = run(case, table)
        written = np.zeros(len(out), np.bool_)
        for number, (begin, end) in enumerate(ranges(table, "out_at")):
            if 0 <= begin <= end <= len(out):
                written[begin:end] = True
            if good[number] and begin >= 0:
                at = int(table[number, COLUMNS.index("target_digest")])
                expected = case.digests[at : at + 16].tobytes() if at >= 0 else None
                found = blake3(out[begin:end].tobytes()).digest()[:16]
                assert expected in (None, found)
        assert bool((out[~written] == FILL).all())
        places = [*ranges(table, "out_at")]
        for number, (begin, end) in enumerate(places):
            apart = all(n == number or e <= begin or b >= end for n, (b, e) in enumerate(places))
            if number not in wrong and apart:
                assert good[number] == usual[number]
            if number in wrong:
                assert_is_marked(table[number].tolist(), good[number])


def assert_is_marked(row: list[int], flag: int) -> None:
    """Check that a row with a number below -1, or one that cannot be, is not good."""
    found = dict(zip(COLUMNS, row, strict=True))
    places = ("base_at", "out_at", "base_digest", "target_digest", "coded_at", "touched_digest")
    bad = any(found[name] < -1 for name in places) or found["width"] not in (1, 2, 4, 8)
    bad |= not 0 <= found["n_bytes"] <= 1 << 20
    if found["coded_at"] >= 0:
        bad |= not 1 <= found["nnz"] <= found["span"] or found["start"] < 0
        bad |= found["kind"] not in (0, 1, 2) or found["index"] not in (0, 1, 2)
        bad |= found["packing"] not in (0, 1) or found["first_stored"] < 0
    assert not (bad and flag), found


def test_a_row_that_is_only_decoded_cannot_be_longer_than_memory() -> None:
    """With neither base nor output, no array bounds the sizes; 8 · span was more than 64 bits."""
    stream = np.array([0, 1, 0, 0, 0, 0], np.uint8)
    digests = np.frombuffer(blake3(stream.tobytes()).digest()[:16], np.uint8)
    for bits in range(10, 63):
        for index, packing in ((0, 0), (2, 0), (2, 1), (0, 1)):
            n = 1 << bits
            row = [-1, -1, n, 1, -1, -1, 0, 0, n, min(n, 2), 0, index, packing, 0, 0, -1]
            good = np.ones(1, np.uint8)
            stored = np.array([2, 2, 2], np.int64)
            empty = np.empty(0, np.uint8)
            native.rebuild_small(empty, stream, digests, stored, np.array([row]), empty, good)  # type: ignore[union-attr]
            assert not (bits > 20 and good[0])


@pytest.mark.parametrize("seed", range(40))
def test_pairs_are_compared_or_refused(seed: int) -> None:
    draw = np.random.default_rng(seed)
    width, n = int(draw.choice([1, 2, 4, 8])), int(draw.integers(1, 9))
    sizes = draw.integers(1, 90, n) * width
    ends = np.cumsum(sizes)
    base = draw.integers(0, 256, int(ends[-1])).astype(np.uint8)
    target = base.copy()
    for at in draw.integers(0, len(target), int(draw.integers(30))):
        target[at] ^= 1
    given = np.array(
        [[e - s, e - s, s, width, width and 1] for e, s in zip(ends, sizes, strict=True)]
    )
    assert_compared(base, target, given)
    for _ in range(200):
        table = given.copy()
        for _ in range(int(draw.integers(1, 3))):
            value = int(draw.choice(EXTREMES)) if draw.random() < 0.5 else int(draw.integers(0, 99))
            table[draw.integers(n), draw.integers(5)] = value
        within = all(
            w in (1, 2, 4, 8) and size >= w and size % w == 0 and 0 <= k <= 2
            and 0 <= b <= len(base) - size and 0 <= t <= len(target) - size
            for b, t, size, w, k in table.tolist()
        )  # fmt: skip
        if within:
            assert_compared(base, target, table)
        else:
            with pytest.raises(ValueError, match="sizes of arrays"):
                compare(base, target, table)


def compare(base: Bytes, target: Bytes, given: Table) -> tuple[Table, Bytes, Bytes]:
    """Return what was found, the digests, and the streams."""
    n = len(given)
    found, digests = np.empty((n, 6), np.int64), np.zeros((n, 64), np.uint8)
    streams = np.full(127 * n, FILL, np.uint8)
    n_bytes = native.compare_small(base, target, given, found, digests.reshape(-1), streams, 1)  # type: ignore[union-attr]
    assert bool((streams[n_bytes:] == FILL).all())
    return found, digests, streams[:n_bytes]


def assert_compared(base: Bytes, target: Bytes, given: Table) -> None:
    """Check what the kernel finds with what numpy finds."""
    found, digests, streams = compare(base, target, given)
    at = 0
    for (b, t, size, width, _), (nnz, _, n_index, n_coded, packing, planes), own in zip(
        given.tolist(), found.tolist(), digests, strict=True
    ):
        old, new = (data[i : i + size].reshape(-1, width) for data, i in ((base, b), (target, t)))
        differ = (old != new).any(axis=1)
        assert nnz in (int(differ.sum()), -1)
        assert differ.sum() <= 32 or nnz == -1
        if nnz < 0:
            continue
        assert own[:16].tobytes() == blake3(old.tobytes()).digest()[:16]
        if nnz:
            assert own[16:32].tobytes() == blake3(new.tobytes()).digest()[:16]
            coded = streams[at : at + n_coded].tobytes()
            assert packing or n_coded == n_index + nnz * bin(planes).count("1")
            assert own[32:48].tobytes() == blake3(coded).digest()[:16]
            assert own[48:56].tobytes() == blake3(old[differ].tobytes()).digest()[:8]
            assert own[56:].tobytes() == blake3(new[differ].tobytes()).digest()[:8]
            at += n_coded
    assert at == len(streams)


@pytest.mark.parametrize("seed", range(20))
def test_digests_of_parts_that_are_not_in_the_data_are_refused(seed: int) -> None:
    draw = random.Random(seed)
    data = draw.randbytes(draw.choice((0, 1, 63, 1024, 3000)))
    for _ in range(100):
        ends = sorted(draw.randrange(len(data) + 1) for _ in range(draw.randrange(5)))
        if ends and draw.random() < 0.7:
            ends[draw.randrange(len(ends))] = draw.choice((*EXTREMES, len(data) + 1, len(data)))
        n = draw.choice((16, 32, 1, 0, -1, 33, 1 << 62))
        out = np.zeros(len(ends) * n if 0 <= n <= 33 else 64, np.uint8)
        right = all(0 <= a <= b <= len(data) for a, b in zip([0, *ends], ends, strict=False))
        if not (right and 1 <= n <= 32):
            with pytest.raises(ValueError, match="sizes of arrays"):
                native.digests_of(data, np.array(ends, np.int64), n, out)  # type: ignore[union-attr]
            continue
        native.digests_of(data, np.array(ends, np.int64), n, out)  # type: ignore[union-attr]
        parts = [data[a:b] for a, b in zip([0, *ends], ends, strict=False)]
        assert out.tobytes() == b"".join(blake3(part).digest()[:n] for part in parts)

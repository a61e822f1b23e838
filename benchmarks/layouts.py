"""The layouts in which other projects send changed weights, written again from their descriptions.

Each holds the same data as its project's; containers are left out or plain. All work on mappings of
tensor names to arrays of the bits of two-byte elements.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import zstandard

Bits = npt.NDArray[np.uint16]
Tensors = dict[str, tuple[tuple[int, ...], Bits]]  # shape, and flat bits


@dataclass(frozen=True, slots=True)
class Layout:
    """A way to encode the changes and to decode them; both functions get the base."""

    encode: Callable[[Tensors, Tensors], bytes]
    decode: Callable[[Tensors, bytes], Tensors]


def changes(base: Tensors, target: Tensors) -> Iterator[tuple[str, npt.NDArray[np.int64], Bits]]:
    """Yield name, changed positions and new bits of every changed tensor."""
    for name, (_, bits) in target.items():
        index = np.flatnonzero(base[name][1] != bits)
        if len(index):
            yield name, index, bits[index]


def _records(parts: Iterator[tuple[str, list[bytes]]]) -> bytes:
    """Return named lists of byte strings joined into one, each preceded by its length."""
    out = []
    for name, pieces in parts:
        coded = [name.encode(), *pieces]
        out.append(struct.pack(f"<B{len(coded)}I", len(coded), *map(len, coded)) + b"".join(coded))
    return b"".join(out)


def _read_records(data: bytes) -> Iterator[tuple[str, list[bytes]]]:
    at = 0
    while at < len(data):
        n = data[at]
        sizes = struct.unpack_from(f"<{n}I", data, at + 1)
        at += 1 + 4 * n
        pieces = []
        for size in sizes:
            pieces.append(data[at : at + size])
            at += size
        yield pieces[0].decode(), pieces[1:]


def _gaps(index: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return np.diff(index, prepend=-1) - 1


def _smallest(numbers: npt.NDArray[np.int64]) -> bytes:
    """Return numbers in the narrowest of three unsigned types, after a byte with its width."""
    width = 1 if numbers.max() < 256 else 2 if numbers.max() < 65536 else 4
    return bytes([width]) + numbers.astype(f"<u{width}").tobytes()


def _widened(data: bytes) -> npt.NDArray[np.int64]:
    return np.frombuffer(data, f"<u{data[0]}", offset=1).astype(np.int64)


def _scattered(base: Tensors, parts: Iterator[tuple[str, npt.NDArray[np.int64], Bits]]) -> Tensors:
    out = {name: (shape, bits.copy()) for name, (shape, bits) in base.items()}
    for name, index, values in parts:
        out[name][1][index] = values
    return out


def _trl1_encode(base: Tensors, target: Tensors) -> bytes:
    parts = changes(base, target)
    return _records((n, [i.astype("<i4").tobytes(), v.tobytes()]) for n, i, v in parts)


def _trl1_decode(base: Tensors, data: bytes) -> Tensors:
    def parts() -> Iterator[tuple[str, npt.NDArray[np.int64], Bits]]:
        for name, (index, values) in _read_records(data):
            yield name, np.frombuffer(index, "<i4").astype(np.int64), np.frombuffer(values, "<u2")

    return _scattered(base, parts())


def _trl2_encode(base: Tensors, target: Tensors) -> bytes:
    parts = changes(base, target)
    return _records((n, [_smallest(_gaps(i)), v.tobytes()]) for n, i, v in parts)


def _trl2_decode(base: Tensors, data: bytes) -> Tensors:
    def parts() -> Iterator[tuple[str, npt.NDArray[np.int64], Bits]]:
        for name, (gaps, values) in _read_records(data):
            yield name, np.cumsum(_widened(gaps) + 1) - 1, np.frombuffer(values, "<u2")

    return _scattered(base, parts())


def _slime_encode(base: Tensors, target: Tensors) -> bytes:
    pack = zstandard.ZstdCompressor(1).compress
    return _records(
        (name, [pack((base[name][1] ^ bits).tobytes())])
        for name, (_, bits) in target.items()
        if (base[name][1] != bits).any()
    )


def _slime_decode(base: Tensors, data: bytes) -> Tensors:
    out = dict(base)
    for name, (frame,) in _read_records(data):
        shape, bits = base[name]
        out[name] = shape, bits ^ np.frombuffer(zstandard.decompress(frame), "<u2")
    return out


def _grail_encode(base: Tensors, target: Tensors) -> bytes:
    """Encode rows as differences, and columns as differences that restart in each row."""

    def parts() -> Iterator[tuple[str, list[bytes]]]:
        for name, index, values in changes(base, target):
            row, column = np.divmod(index, target[name][0][-1])
            rows = np.diff(row, prepend=0)
            step = np.diff(column, prepend=0)
            columns = np.where(rows > 0, column, step)
            yield name, [_smallest(rows), _smallest(columns), values.tobytes()]

    return zstandard.ZstdCompressor(1).compress(_records(parts()))


def _grail_decode(base: Tensors, data: bytes) -> Tensors:
    def parts() -> Iterator[tuple[str, npt.NDArray[np.int64], Bits]]:
        for name, (rows, columns, values) in _read_records(zstandard.decompress(data)):
            step, column = _widened(rows), _widened(columns)
            total = np.cumsum(column)
            begins = np.flatnonzero(np.append(True, step[1:] > 0))
            before = np.repeat(
                total[begins] - column[begins], np.diff(np.append(begins, len(column)))
            )
            index = np.cumsum(step) * base[name][0][-1] + total - before
            yield name, index, np.frombuffer(values, "<u2")

    return _scattered(base, parts())


def _nemo_encode(base: Tensors, target: Tensors) -> bytes:
    def parts() -> Iterator[tuple[str, list[bytes]]]:
        for name, index, values in changes(base, target):
            gaps = _gaps(index)
            wide = np.flatnonzero(gaps >= 65535)
            tokens = np.minimum(gaps, 65535).astype("<u2")
            xor = values ^ base[name][1][index]
            yield name, [tokens.tobytes(), gaps[wide].astype("<u4").tobytes(), xor.tobytes()]

    return zstandard.ZstdCompressor(1).compress(_records(parts()))


def _nemo_decode(base: Tensors, data: bytes) -> Tensors:
    def parts() -> Iterator[tuple[str, npt.NDArray[np.int64], Bits]]:
        for name, (tokens, wide, xor) in _read_records(zstandard.decompress(data)):
            gaps = np.frombuffer(tokens, "<u2").astype(np.int64)
            gaps[gaps == 65535] = np.frombuffer(wide, "<u4")
            index = np.cumsum(gaps + 1) - 1
            yield name, index, np.frombuffer(xor, "<u2") ^ base[name][1][index]

    return _scattered(base, parts())


LAYOUTS = {
    "TRL v1": Layout(_trl1_encode, _trl1_decode),
    "TRL v2": Layout(_trl2_encode, _trl2_decode),
    "slime": Layout(_slime_encode, _slime_decode),
    "grail": Layout(_grail_encode, _grail_decode),
    "NeMo-RL": Layout(_nemo_encode, _nemo_decode),
}

"""The streams of PULSEPT1: positions as gaps of 16 bits (version 1), as Rice codes (2), or as Rice codes by exponent (3).

Versions 2 and 3 store values as differences to the old bit patterns. Written from the layout that the comments of
basilica-sdk 0.36.8 state. Every function refuses what the writer of that package does not write.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from sparsedelta.codecs.values import Bits
from sparsedelta.errors import Corrupt

Indices = npt.NDArray[np.int64]
Bytes = bytes | memoryview

_GAP_ESCAPE = 0xFFFF
_RICE_ESCAPE = 32  # so many one-bits stand for a quotient that is stored apart
_MOST_RICE_BITS = 31
_VALUE_ESCAPE = 0xFF
_RECORD = np.dtype([("exponent", "u1"), ("flags", "u1"), ("n", "<u4"), ("n_bytes", "<u4")])


def _damaged(what: str) -> Corrupt:
    return Corrupt(f"{what}; the delta is damaged")


def decode_gaps(data: Bytes, count: int, n_elements: int) -> Indices:
    """Return flat indices: the first as u32, then gaps as u16, or as the escape 0xFFFF and a u32."""
    if not count and not len(data):
        return np.empty(0, np.int64)
    if not count or len(data) < 4 or len(data) % 2:
        raise _damaged("the indices have a wrong size")
    cells = np.frombuffer(data[4:], "<u2")
    parts, at = [np.frombuffer(data[:4], "<u4").astype(np.int64)], 0
    for mark in np.flatnonzero(cells == _GAP_ESCAPE).tolist():
        if mark < at:  # the half of an escaped gap, not a mark
            continue
        if mark + 3 > len(cells):
            raise _damaged("the last gap is cut off")
        wide = int(cells[mark + 1]) | int(cells[mark + 2]) << 16
        parts += [cells[at:mark].astype(np.int64), np.array([wide], np.int64)]
        at = mark + 3
    parts.append(cells[at:].astype(np.int64))
    gaps = np.concatenate(parts)
    if len(gaps) != count or int(gaps.max()) >= n_elements:  # so that the sum does not overflow
        raise _damaged(f"the indices are not {count} positions in {n_elements} elements")
    return np.cumsum(gaps)


def encode_gaps(indices: Indices) -> bytes:
    """Return the stream that ``decode_gaps`` reads."""
    gaps = np.diff(indices)
    wide = gaps >= _GAP_ESCAPE
    cells = np.zeros((len(gaps), 3), "<u2")
    cells[:, 0] = np.where(wide, _GAP_ESCAPE, gaps)
    cells[:, 1], cells[:, 2] = gaps & 0xFFFF, gaps >> 16
    used = np.ones((len(gaps), 3), np.bool_)
    used[~wide, 1:] = False
    return indices[:1].astype("<u4").tobytes() + cells[used].tobytes()


def decode_rice(data: Bytes, count: int, n_elements: int) -> Indices:
    """Return flat indices from Rice codes of the first index and of each gap less one.

    The parameter as u8 and the size of the unary codes as u32; the quotients in unary (ones, then a zero); the
    remainders; the quotients that are too large for the unary codes, as u32.

    Args:
        data: the stream.
        count: how many indices it holds, at most ``n_elements``.
        n_elements: elements of the tensor, below 2^32.
    """
    if not count and not len(data):
        return np.empty(0, np.int64)
    if not 0 < count <= n_elements or len(data) < 5 or data[0] > _MOST_RICE_BITS:
        raise _damaged(f"the indices are not {count} Rice codes")
    k, n_unary = data[0], int.from_bytes(data[1:5], "little")
    n_remainders = (count * k + 7) // 8
    rest = 5 + n_unary + n_remainders
    if n_unary > (count * (_RICE_ESCAPE + 1) + 7) // 8 or rest > len(data):
        raise _damaged("the unary codes have a wrong size")
    ends = np.flatnonzero(np.unpackbits(np.frombuffer(data[5 : 5 + n_unary], np.uint8)) == 0)
    if len(ends) != count or n_unary != int(ends[-1]) // 8 + 1:
        raise _damaged(f"the unary codes are not {count}")
    values = np.diff(ends, prepend=-1).astype(np.int64, copy=False) - 1
    escaped = values == _RICE_ESCAPE
    large = np.frombuffer(data[rest:], "<u4") if (len(data) - rest) % 4 == 0 else np.empty(0, "<u4")
    if int(values.max()) > _RICE_ESCAPE or rest + 4 * int(escaped.sum()) != len(data):
        raise _damaged("the large quotients have a wrong size")
    if len(large) and int(large.min()) < _RICE_ESCAPE:
        raise _damaged("a small quotient is stored as a large one")
    values[escaped] = large
    values <<= k
    values |= _read_fixed(data[5 + n_unary : rest], count, k)
    # The sum of values below 2^32, fewer than 2^32, does not overflow as uint64.
    if int(values.max()) >= n_elements or int((values + 1).sum(dtype=np.uint64)) > n_elements:
        raise _damaged(f"an index is outside of the {n_elements} elements")
    return np.cumsum(values + 1) - 1


def encode_rice(indices: Indices) -> bytes:
    """Return the stream that ``decode_rice`` reads."""
    if not len(indices):
        return b""
    values = np.diff(indices, prepend=-1) - 1
    estimate = int(values.mean()).bit_length()
    k = min(
        range(max(0, estimate - 8), min(_MOST_RICE_BITS, estimate + 1) + 1),
        key=lambda bits: _cost(values, bits),
    )
    quotients = values >> k
    ends = np.cumsum(np.minimum(quotients, _RICE_ESCAPE) + 1) - 1
    bits = np.ones((int(ends[-1]) // 8 + 1) * 8, np.uint8)
    bits[ends] = 0
    unary = np.packbits(bits).tobytes()
    large = quotients[quotients >= _RICE_ESCAPE].astype("<u4").tobytes()
    head = bytes([k]) + len(unary).to_bytes(4, "little")
    return head + unary + _fixed(values, k) + large


def _cost(values: Indices, k: int) -> int:
    quotients = values >> k
    n_large = int(np.count_nonzero(quotients >= _RICE_ESCAPE))
    return int(np.minimum(quotients, _RICE_ESCAPE).sum()) + len(values) * k + 32 * n_large


def _fixed(values: Indices, k: int) -> bytes:
    """Return the low ``k`` bits of each value, the highest bit first, packed."""
    bits = np.empty((len(values), k), np.uint8)
    for column in range(k):
        bits[:, column] = (values >> (k - 1 - column)) & 1
    return np.packbits(bits.reshape(-1)).tobytes()


def _read_fixed(data: Bytes, count: int, k: int) -> Indices:
    bits = np.unpackbits(np.frombuffer(data, np.uint8), count=count * k).reshape(count, k)
    values = np.zeros(count, np.int64)
    for column in range(k):
        values = values << 1 | bits[:, column]
    return values


def decode_by_exponent(data: Bytes, count: int, old: Bits) -> Indices:
    """Return flat indices from Rice codes of ranks among the elements with the same old exponent.

    A u16 with the number of records; the records; then the Rice codes of each. If most elements of an exponent
    change, the unchanged ones are listed.

    Args:
        data: the stream.
        count: how many indices it holds.
        old: (n,) bits of the BF16 tensor before the change.
    """
    if not count and not len(data):
        return np.empty(0, np.int64)
    n_records = int.from_bytes(data[:2], "little")
    at = 2 + n_records * _RECORD.itemsize
    if not 1 <= n_records <= 256 or len(data) < at:
        raise _damaged("the records of the exponents are cut off")
    records = np.frombuffer(data[2:at], _RECORD)
    order, starts = _by_exponent(old)
    found, before = [], -1
    for exponent, flags, n, n_bytes in records.tolist():
        members = order[starts[exponent] : starts[exponent + 1]]
        of_rest = bool(flags)
        n_changed = len(members) - n if of_rest else n
        if exponent <= before or flags > 1 or not 0 < n_changed <= len(members):
            raise _damaged(f"the record of exponent {exponent} is wrong")
        if (2 * n_changed > len(members)) != of_rest or at + n_bytes > len(data):
            raise _damaged(f"the record of exponent {exponent} is wrong")
        ranks = decode_rice(data[at : at + n_bytes], n, len(members))
        found.append(np.delete(members, ranks) if of_rest else members[ranks])
        at, before = at + n_bytes, exponent
    if at != len(data) or sum(map(len, found)) != count:
        raise _damaged(f"the indices are not {count}")
    return np.sort(np.concatenate(found))


def encode_by_exponent(indices: Indices, old: Bits) -> bytes:
    """Return the stream that ``decode_by_exponent`` reads."""
    if not len(indices):
        return b""
    parts = [*_parts(indices, old)]
    records = np.array([(e, rest, n, len(stream)) for e, rest, n, stream in parts], _RECORD)
    streams = b"".join(stream for *_, stream in parts)
    return len(parts).to_bytes(2, "little") + records.tobytes() + streams


def _parts(indices: Indices, old: Bits) -> Iterator[tuple[int, bool, int, bytes]]:
    """Yield each exponent with changes, whether the rest is listed, how many are listed, and their stream."""
    order, starts = _by_exponent(old)
    changed = np.zeros(len(old), np.bool_)
    changed[indices] = True
    for exponent in range(256):
        marks = changed[order[starts[exponent] : starts[exponent + 1]]]
        n_changed = int(marks.sum())
        if n_changed:
            of_rest = 2 * n_changed > len(marks)
            ranks = np.flatnonzero(~marks if of_rest else marks)
            yield exponent, of_rest, len(ranks), encode_rice(ranks)


def _by_exponent(old: Bits) -> tuple[Indices, Indices]:
    """Return the flat indices sorted by exponent, and where each of the 256 exponents begins."""
    exponents = (old >> 7).astype(np.uint8)
    starts = np.zeros(257, np.int64)
    np.cumsum(np.bincount(exponents, minlength=256), out=starts[1:])
    return np.argsort(exponents, kind="stable"), starts


def decode_values(data: Bytes, old: Bits) -> Bits:
    """Return new bits from zigzag differences to the old ones: a byte each, or the escape 0xFF and a u16 at the end.

    Args:
        data: the stream.
        old: (nnz,) bits of the changed elements before the change, BF16.
    """
    symbols = np.frombuffer(data[: len(old)], np.uint8)
    escaped = symbols == _VALUE_ESCAPE
    if len(data) != len(old) + 2 * int(escaped.sum()):
        raise _damaged("the values have a wrong size")
    zigzag = symbols.astype(np.uint16)
    large = np.frombuffer(data[len(old) :], "<u2")
    if (len(large) and int(large.min()) < _VALUE_ESCAPE) or not symbols.all():
        raise _damaged("a value is not stored as it should be")
    zigzag[escaped] = large
    found: Bits = old + ((zigzag >> 1) ^ -(zigzag & 1))
    return found


def encode_values(old: Bits, new: Bits) -> bytes:
    """Return the stream that ``decode_values`` reads; every new value differs from the old one."""
    difference = (new - old).view(np.int16)
    zigzag = ((difference << 1) ^ (difference >> 15)).view(np.uint16)
    symbols = np.minimum(zigzag, _VALUE_ESCAPE).astype(np.uint8)
    large: npt.NDArray[np.uint16] = zigzag[symbols == _VALUE_ESCAPE]
    return symbols.tobytes() + large.astype("<u2").tobytes()

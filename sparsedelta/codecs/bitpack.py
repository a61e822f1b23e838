"""Numbers as bits (FORMAT §6.5): packed, as Rice codes, or in groups of seven.

Rice codes come in sequences, each with a parameter k. A number is split in its low k bits and the rest. First come
the low bits of all numbers, packed, sequence after sequence. Then come the rests, in the same order: a rest of r is
r zero bits and a one. A decoder can find all ones at once, without reading number by number.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from sparsedelta.codecs import kernels
from sparsedelta.errors import Corrupt

Numbers = npt.NDArray[np.uint32]  # (n,)
Bytes = npt.NDArray[np.uint8]

MAX_LOW_BITS = 31
_MAX_NUMBER_BYTES = 5
_BLOCK = 1 << 16  # numbers in one step: they fit the cache, and fill whole bytes for every k


def blocks(n: int) -> Iterator[slice]:
    """Yield slices that cover ``n`` numbers, so that temporary arrays stay small."""
    for start in range(0, n, _BLOCK):
        yield slice(start, min(start + _BLOCK, n))


def best_low_bits(numbers: Numbers) -> int:
    """Return the parameter k that codes ``numbers`` in the fewest bits."""
    n = len(numbers)
    if not n:
        return 0
    mean = _shifted_sum(numbers, 0) / n
    guess = max(0, int(mean * 0.7).bit_length() - 1)
    candidates = range(max(0, guess - 1), min(MAX_LOW_BITS, guess + 1) + 1)
    bits = {k: _shifted_sum(numbers, k) + n * k for k in candidates}
    return min(bits, key=bits.__getitem__)


def _shifted_sum(numbers: Numbers, k: int) -> int:
    if kernels.native:
        total: int = kernels.native.shifted_sum(numbers, k)
        return total
    return int((numbers >> k).sum(dtype=np.uint64))


def encode_rice(sequences: Iterable[tuple[Numbers, int]]) -> bytes:
    """Return the Rice codes of sequences of numbers, each with its k."""
    pairs = list(sequences)
    lows = [pack(numbers, k).tobytes() for numbers, k in pairs]
    return b"".join([*lows, _unary(pairs).tobytes()])


def decode_rice(data: bytes, lengths: Sequence[tuple[int, int]]) -> list[Numbers]:
    """Return the sequences in ``data``.

    Args:
        data: Rice codes.
        lengths: the number of codes and k of each sequence.

    Raises:
        Corrupt: ``data`` does not hold exactly these sequences.
    """
    raw = np.frombuffer(data, np.uint8)
    sizes = [-(-n * k // 8) for n, k in lengths]
    n_low_bytes = sum(sizes)
    if n_low_bytes > len(raw):
        raise Corrupt(f"stream has {len(raw)} bytes, expected at least {n_low_bytes}")
    total = sum(n for n, _ in lengths)
    if total > 8 * (len(raw) - n_low_bytes):
        raise Corrupt(f"stream does not hold exactly {total} numbers")
    if kernels.native:
        numbers = np.empty(total, np.uint32)
        kernels.native.decode_rice(raw, np.array(lengths, np.int64), numbers)
        ends = [*itertools.accumulate((n for n, _ in lengths), initial=0)]
        return [numbers[start:end] for start, end in itertools.pairwise(ends)]
    counts = _counts(raw[n_low_bytes:], total)
    result, start, first = [], 0, 0
    for size, (n, k) in zip(sizes, lengths, strict=True):
        numbers = counts[first : first + n]
        if len(numbers) and int(numbers.max()) >> (32 - k):
            raise Corrupt("stream holds a number of more than 32 bits")
        numbers <<= np.uint32(k)
        numbers |= unpack(raw[start : start + size], n, k)
        result.append(numbers)
        start, first = start + size, first + n
    return result


def pack(numbers: npt.NDArray[Any], k: int) -> Bytes:
    """Return the low ``k`` bits of every number, end to end, the least significant first."""
    packed = np.empty(-(-len(numbers) * k // 8), np.uint8)
    if kernels.native:
        kernels.native.pack(np.ascontiguousarray(numbers), k, packed)
        return packed
    for block in blocks(len(numbers) if k else 0):
        part = numbers[block]
        bits = np.empty((len(part), k), np.uint8)
        for j in range(k):
            np.bitwise_and(part >> j, 1, out=bits[:, j], casting="unsafe")
        packed[_bytes_of(block, k)] = np.packbits(bits, bitorder="little")
    return packed


def unpack(data: Bytes, n: int, k: int) -> Numbers:
    """Return ``n`` numbers of ``k`` bits; ``data`` has exactly the bytes that they fill.

    Raises:
        Corrupt: a bit after the last number is set.
    """
    if n * k % 8 and data[-1] >> n * k % 8:
        raise Corrupt("stream has a bit set after packed numbers")
    numbers = np.zeros(n, np.uint32)
    if kernels.native:
        kernels.native.unpack(data, k, numbers)
        return numbers
    for block in blocks(n if k else 0):
        part = numbers[block]
        bits = np.unpackbits(data[_bytes_of(block, k)], count=len(part) * k, bitorder="little")
        for j in reversed(range(k)):
            part <<= 1
            part |= bits[j::k]
    return numbers


def _bytes_of(block: slice, k: int) -> slice:
    return slice(block.start * k // 8, -(-block.stop * k // 8))


def _unary(sequences: Sequence[tuple[Numbers, int]]) -> Bytes:
    n_bits = sum(len(numbers) + _shifted_sum(numbers, k) for numbers, k in sequences)
    at = 0
    if kernels.native:
        packed = np.zeros(-(-n_bits // 8), np.uint8)
        for numbers, k in sequences:
            at = kernels.native.put_unary(numbers, k, packed, at)
        return packed
    bits = np.zeros(n_bits, np.bool_)
    for numbers, k in sequences:
        for block in blocks(len(numbers)):
            ends = np.cumsum(numbers[block] >> k, dtype=np.int64)
            ends += np.arange(at, at + len(ends))
            bits[ends] = True
            at = int(ends[-1]) + 1
    return np.packbits(bits, bitorder="little")


def _counts(data: Bytes, n: int) -> Numbers:
    counts = np.empty(n, np.uint32)
    found, last = 0, -1
    for block in blocks(len(data)):
        ends = np.flatnonzero(np.unpackbits(data[block], bitorder="little").view(np.bool_))
        ends += 8 * block.start
        start, found = found, found + len(ends)
        if found > len(counts):
            break
        if len(ends):
            counts[start:found] = np.diff(ends, prepend=last) - 1
            last = int(ends[-1])
    if found != n or (len(data) and not data[-1]):
        raise Corrupt(f"stream does not hold exactly {n} numbers")
    return counts


def write_number(number: int) -> bytes:
    """Return a number in groups of seven bits, the lowest first. All bytes but the last are above 127."""
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    out.append(number)
    return bytes(out)


def read_number(stream: bytes, at: int) -> tuple[int, int]:
    """Return the number at ``at``, and the offset after it.

    Raises:
        Corrupt: the number does not end within the stream, or has more than 32 bits.
    """
    number = 0
    for i, byte in enumerate(stream[at : at + _MAX_NUMBER_BYTES]):
        number |= (byte & 127) << 7 * i
        if byte < 128 and not number >> 32:
            return number, at + i + 1
    raise Corrupt("stream has a number that does not end, or that has more than 32 bits")

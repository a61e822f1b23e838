"""Streams that work below a byte (FORMAT §6 and §7), written number by number, right or wrong."""

from __future__ import annotations

from collections.abc import Sequence

Sequences = list[tuple[Sequence[int], int]]  # numbers and their parameter


def number(n: int, n_bytes: int = 1) -> bytes:
    """Return a number in groups of seven bits, in `n_bytes` at least."""
    out: list[int] = []
    while n > 127 or len(out) + 1 < n_bytes:
        out.append(n & 127 | 128)
        n >>= 7
    return bytes([*out, n])


def packed(numbers: Sequence[int], k: int) -> bytes:
    """Return the low k bits of numbers, end to end."""
    bits = sum((n & (1 << k) - 1) << k * i for i, n in enumerate(numbers))
    return bits.to_bytes((k * len(numbers) + 7) // 8, "little")


def rice(sequences: Sequences) -> bytes:
    """Return sequences of numbers as Rice codes."""
    ones, at = 0, 0
    for numbers, k in sequences:
        for n in numbers:
            at += n >> k
            ones |= 1 << at
            at += 1
    low = b"".join(packed(numbers, k) for numbers, k in sequences)
    return low + ones.to_bytes((at + 7) // 8, "little")


def subset(chosen: Sequence[int], n: int, k: int) -> tuple[bytes, tuple[list[int], int]]:
    """Return the head and the gaps of a subset of n things, of the rest if that is smaller."""
    rest = 2 * len(chosen) > n
    listed = sorted(set(range(n)) - set(chosen)) if rest else list(chosen)
    gaps = [b - a - 1 for a, b in zip([-1, *listed], listed, strict=False)]
    head = number(2 * len(gaps) + rest) + (number(k) if gaps else b"")
    return head, (gaps, k)


def key(bits: int, width: int) -> int:
    """Return the key of an element."""
    return bits & 127 if width == 1 else bits >> 8 * width - 9 & 255


def classes(keys: Sequence[int], thresholds: Sequence[int]) -> list[list[int]]:
    """Return the places of keys by class."""
    out: list[list[int]] = [[] for _ in range(len(thresholds) + 1)]
    for place, one in enumerate(keys):
        out[sum(one >= t for t in thresholds)].append(place)
    return out


def rice_index(
    positions: Sequence[int], keys: Sequence[int], thresholds: Sequence[int], k: int
) -> bytes:
    """Return a `rice` stream of elements with these keys, all of its parameters k."""
    head = bytes([len(thresholds), *thresholds])
    sequences: Sequences = []
    for members in classes(keys, thresholds):
        ranks = [rank for rank, place in enumerate(members) if place in set(positions)]
        part, sequence = subset(ranks, len(members), k)
        head += part
        sequences.append(sequence)
    return head + rice(sequences)


def tiles(
    positions: Sequence[int],
    first: int,
    rows: Sequence[int],
    columns: Sequence[int],
    k: int,
) -> bytes:
    """Return a `tiles` stream of bands by row and by column, all of its parameters k."""
    n_bands = max(rows) + 1, max(columns) + 1
    head = number(len(columns)) + number(first)
    head += bytes([n_bands[0], k, n_bands[1], k])
    sequences: Sequences = [(rows, k), (columns, k)]
    cells = {divmod(p + first, len(columns)) for p in positions}
    for band in range(n_bands[0]):
        for other in range(n_bands[1]):
            down = [r for r, label in enumerate(rows) if label == band]
            across = [c for c, label in enumerate(columns) if label == other]
            tile = [(r, c) for r in down for c in across]
            places = [place for place, cell in enumerate(tile) if cell in cells]
            part, sequence = subset(places, len(tile), k)
            head += part
            sequences.append(sequence)
    return head + rice(sequences)


def steps(codes: Sequence[int], keys: Sequence[int], thresholds: Sequence[int], k: int) -> bytes:
    """Return a `steps` stream, its parameters k."""
    head = bytes([len(thresholds), *thresholds])
    signs: list[int] = []
    sequences: Sequences = []
    for members in classes(keys, thresholds):
        units = [(codes[i] - 1) // 2 for i in members]
        signs += [(codes[i] - 1) % 2 for i in members]
        long = [i for i, n in enumerate(units) if n]
        part, sequence = subset(long, len(units), k)
        head += part + number(k)
        sequences += [sequence, ([units[i] - 1 for i in long], k)]
    return head + packed(signs, 1) + rice(sequences)


def scaled(codes: Sequence[int]) -> tuple[bytes, bytes]:
    """Return the two streams of `scaled`."""
    below = [max(n.bit_length() - 2, 0) for n in codes]
    symbols = bytes((n >> b) + 2 * b for n, b in zip(codes, below, strict=True))
    lower = b""
    for k in range(1, 31):
        lower += packed([n for n, b in zip(codes, below, strict=True) if b == k], k)
    return symbols, lower

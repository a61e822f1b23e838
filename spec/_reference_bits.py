"""Positions and codes of the encodings that work below a byte (FORMAT §6.5 to §7.5), bit by bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from _reference_json import check

Head = tuple[int, int, bool]  # number of gaps, parameter, whether they are of the others


class Reader:
    """Reads a stream from its front: bytes, numbers of groups of seven bits, and bits."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0  # in bits

    def bits(self, n: int) -> int:
        """Return the next n bits as a number, the first the least significant."""
        check(self.at + n <= 8 * len(self.data), "corrupt", "stream ends early")
        first, end = self.at // 8, (self.at + n + 7) // 8
        window = int.from_bytes(self.data[first:end], "little") >> self.at % 8
        self.at += n
        return window & ((1 << n) - 1)

    def number(self) -> int:
        """Return the next number (§6.5)."""
        out = 0
        for i in range(5):
            byte = self.bits(8)
            out |= (byte & 127) << 7 * i
            if byte < 128:
                check(out < 1 << 32, "corrupt", "a number of more than 32 bits")
                return out
        check(False, "corrupt", "a number of more than five bytes")
        return out

    def align(self) -> None:
        """Go on to the next whole byte; what is left of this one must be zero."""
        check(self.bits(-self.at % 8) == 0, "corrupt", "a bit is set where none may be")

    def packed(self, n: int, k: int) -> list[int]:
        """Return n numbers of k bits, and go on to the next byte."""
        check(self.at + n * k <= 8 * len(self.data), "corrupt", "stream ends early")
        out = [self.bits(k) for _ in range(n)]
        self.align()
        return out

    def rice(self, lengths: Sequence[tuple[int, int]]) -> list[list[int]]:
        """Return sequences of n numbers with parameter k each, to the end of the stream."""
        for _, k in lengths:
            check(k <= 31, "corrupt", f"parameter {k}")
        check(sum(n for n, _ in lengths) <= 8 * len(self.data), "corrupt", "stream ends early")
        lows = [self.packed(n, k) for n, k in lengths]
        out: list[list[int]] = []
        for low, (_, k) in zip(lows, lengths, strict=True):
            out.append([])
            for bits in low:
                high = 0
                while not self.bits(1):
                    high += 1
                check(high << k < 1 << 32, "corrupt", "a number of more than 32 bits")
                out[-1].append(high << k | bits)
        self.align()
        check(self.at == 8 * len(self.data), "corrupt", "stream goes on after its end")
        return out

    def subset_head(self) -> Head:
        """Return the head of a subset."""
        doubled = self.number()
        k = self.number() if doubled > 1 else 0
        return doubled // 2, k, doubled % 2 == 1

    def thresholds(self) -> list[int]:
        """Return the thresholds between classes."""
        out = [self.bits(8) for _ in range(self.bits(8))]
        fair = all(a < b for a, b in zip([0, *out], out, strict=False))
        check(fair, "corrupt", "thresholds do not ascend")
        return out


def subset(head: Head, gaps: Sequence[int], n: int) -> list[int]:
    """Return which of n things are chosen."""
    chosen, at = [], -1
    for gap in gaps:
        at += gap + 1
        chosen.append(at)
    check(at < n, "corrupt", f"number {at} of {n} is chosen")
    if not head[2]:
        return chosen
    left_out = set(chosen)
    return [i for i in range(n) if i not in left_out]


def key(bits: int, width: int) -> int:
    """Return the key of an element of the base."""
    return bits & 127 if width == 1 else bits >> 8 * width - 9 & 255


def exponent(stream: bytes, length: int, keys: Sequence[int]) -> list[int]:
    """Return the positions of an `exponent` stream, given the keys of the span (§6.6)."""
    reader = Reader(stream)
    thresholds = reader.thresholds()
    heads = [reader.subset_head() for _ in range(len(thresholds) + 1)]
    classes: list[list[int]] = [[] for _ in heads]
    for position in range(length):
        classes[sum(keys[position] >= t for t in thresholds)].append(position)
    out = []
    sequences = reader.rice([head[:2] for head in heads])
    for head, gaps, members in zip(heads, sequences, classes, strict=True):
        out += [members[i] for i in subset(head, gaps, len(members))]
    return sorted(out)


def tiles(stream: bytes, length: int) -> list[int]:
    """Return the positions of a `tiles` stream (§6.7)."""
    reader = Reader(stream)
    columns, first = reader.number(), reader.number()
    check(2 <= columns <= length and first < columns, "corrupt", f"{columns} columns")
    n_rows = (first + length + columns - 1) // columns
    (row_bands, row_k), (column_bands, column_k) = (
        (reader.number(), reader.number()) for _ in range(2)
    )
    fair = 1 <= row_bands <= 64 and 1 <= column_bands <= 64
    check(fair, "corrupt", f"{row_bands} by {column_bands} bands")
    heads = [reader.subset_head() for _ in range(row_bands * column_bands)]
    row_labels, column_labels, *sequences = reader.rice(
        [(n_rows, row_k), (columns, column_k), *(head[:2] for head in heads)]
    )
    fair = max(row_labels) < row_bands and max(column_labels) < column_bands
    check(fair, "corrupt", "a band that is none")
    out = []
    for number, (head, gaps) in enumerate(zip(heads, sequences, strict=True)):
        band, other = divmod(number, column_bands)
        rows = [r for r in range(n_rows) if row_labels[r] == band]
        across = [c for c in range(columns) if column_labels[c] == other]
        for place in subset(head, gaps, len(rows) * len(across)):
            row, column = divmod(place, len(across))
            out.append(rows[row] * columns + across[column] - first)
    out.sort()
    check(not out or out[0] >= 0, "corrupt", "a position before the span")
    return out


def rice(stream: bytes, length: int) -> list[int]:
    """Return the positions of a `rice` stream (§6.8)."""
    reader = Reader(stream)
    head = reader.subset_head()
    return subset(head, reader.rice([head[:2]])[0], length)


def steps(stream: bytes, nnz: int, width: int, keys: Sequence[int] | None) -> list[int]:
    """Return the codes of a `steps` stream, or with keys of an `exponent_steps` stream (§7.4)."""
    reader = Reader(stream)
    thresholds = reader.thresholds()
    check(keys is not None or not thresholds, "corrupt", "steps in classes")
    classes: list[list[int]] = [[] for _ in range(len(thresholds) + 1)]
    for i in range(nnz):
        classes[sum(keys[i] >= t for t in thresholds) if keys is not None else 0].append(i)
    heads, lengths = [], []
    for members in classes:
        heads.append(reader.subset_head())
        k = reader.number()
        n_long = len(members) - heads[-1][0] if heads[-1][2] else heads[-1][0]
        check(0 <= n_long <= len(members), "corrupt", "more long steps than steps")
        lengths += [heads[-1][:2], (n_long, k)]
    signs = reader.packed(nnz, 1)
    sequences = reader.rice(lengths)
    out = [0] * nnz
    ordered = 0
    for members, head, gaps, excess in zip(
        classes, heads, sequences[::2], sequences[1::2], strict=True
    ):
        beyond = [0] * len(members)
        for i, more in zip(subset(head, gaps, len(members)), excess, strict=True):
            beyond[i] = 1 + more
        for i, units in zip(members, beyond, strict=True):
            out[i] = 2 * units + signs[ordered] + 1
            ordered += 1
            check(out[i] < 1 << 8 * width, "corrupt", f"a code of more than {width} bytes")
    return out


def scaled(symbols: bytes, lower: bytes, width: int) -> list[int]:
    """Return the codes of `scaled` streams (§7.5)."""
    check(max(symbols) <= min(63, 16 * width - 1), "corrupt", "a symbol that is none")
    reader = Reader(lower)
    out = list(symbols)
    for k in range(1, 31):
        mine = [i for i, symbol in enumerate(symbols) if symbol // 2 == k + 1]
        for i, bits in zip(mine, reader.packed(len(mine), k), strict=True):
            out[i] = (2 + symbols[i] % 2) << k | bits
    check(reader.at == 8 * len(lower), "corrupt", "stream goes on after its end")
    return out


PACKINGS: dict[str, Callable[[list[bytes], int, int, list[int] | None], list[int]]] = {
    "steps": lambda streams, nnz, width, keys: steps(streams[0], nnz, width, None),
    "exponent_steps": lambda streams, nnz, width, keys: steps(streams[0], nnz, width, keys),
    "scaled": lambda streams, nnz, width, keys: scaled(streams[0], streams[1], width),
}

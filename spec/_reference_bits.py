"""Decode index and value streams bit by bit, for the reference decoder (FORMAT §6 and §7).

In all functions, `keys` are the keys of the elements that a stream sorts into classes (§6.2). If `keys`
is empty, the stream must have no thresholds.
"""

from __future__ import annotations

from collections.abc import Sequence

from _reference_json import check

Head = tuple[int, int, int]  # number of gaps g, their parameter k, and r (§6.1)


class Reader:
    """Reads a stream from its first bit to its last."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0  # in bits

    def bits(self, n: int) -> int:
        """Return the next n bits as a number; the first bit is the least significant."""
        check(self.at + n <= 8 * len(self.data), "corrupt", "a stream ends early")
        first, end = self.at // 8, (self.at + n + 7) // 8
        window = int.from_bytes(self.data[first:end], "little") >> self.at % 8
        self.at += n
        return window & ((1 << n) - 1)

    def number(self) -> int:
        """Return the next number (§6.1). Callers check its range, which is below 2^32."""
        out = shift = 0
        while True:
            byte = self.bits(8)
            out |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return out
            check(shift < 35, "corrupt", "a number has more than five bytes")

    def align(self) -> None:
        """Skip to the next whole byte; the bits skipped must be zero."""
        padding = self.bits(-self.at % 8)
        check(padding == 0, "corrupt", "a padding bit is set")

    def end(self) -> None:
        """Check that the stream has no further bytes."""
        check(self.at == 8 * len(self.data), "corrupt", "bytes follow the end of a stream")

    def packed(self, n: int, k: int) -> list[int]:
        """Return n numbers of k bits, and skip to the next byte."""
        out = [self.bits(k) for _ in range(n)]
        self.align()
        return out

    def rice(self, lengths: Sequence[tuple[int, int]]) -> list[list[int]]:
        """Return sequences of numbers from Rice codes, which end the stream (§6.1).

        Args:
            lengths: for each sequence, the number n of its numbers and its parameter k.
        """
        check(all(k <= 31 for _, k in lengths), "corrupt", "a parameter is above 31")
        valid = sum(n for n, _ in lengths) <= 8 * len(self.data)  # a number takes at least one bit
        check(valid, "corrupt", "a stream ends early")
        out = [self.packed(n, k) for n, k in lengths]
        for numbers, (n, k) in zip(out, lengths, strict=True):
            for i in range(n):
                high = 0
                while not self.bits(1):
                    high += 1
                numbers[i] += high << k
        self.align()
        self.end()
        return out

    def head(self) -> Head:
        """Return the head of a subset."""
        doubled = self.number()
        return doubled // 2, self.number() if doubled > 1 else 0, doubled % 2

    def classes(self, keys: Sequence[int], n: int) -> list[list[int]]:
        """Read thresholds; return for each class which of n elements belong to it (§6.2)."""
        thresholds = [self.bits(8) for _ in range(self.bits(8))]
        check(len(thresholds) <= 15, "corrupt", "more than 15 thresholds")
        valid = all(a < b for a, b in zip([0, *thresholds], thresholds, strict=False))
        check(valid, "corrupt", "thresholds do not ascend")
        check(bool(keys) or not thresholds, "corrupt", "thresholds in a chunk without classes")
        out: list[list[int]] = [[] for _ in range(len(thresholds) + 1)]
        for i in range(n):
            out[sum(keys[i] >= t for t in thresholds)].append(i)
        return out


def subset(head: Head, gaps: Sequence[int], n: int) -> list[int]:
    """Return which of n items a subset chooses (§6.1)."""
    stated, at = [], -1
    for gap in gaps:
        at += gap + 1
        stated.append(at)
    check(at < n, "corrupt", f"a subset states item {at} of {n}")
    return stated if not head[2] else sorted(set(range(n)) - set(stated))


def key(bits: int, width: int) -> int:
    """Return the key of an element (§6.2)."""
    return bits & 127 if width == 1 else bits >> 8 * width - 9 & 255


def gaps(stream: bytes) -> list[int]:
    """Return the positions of a `gaps` stream (§6.3)."""
    out, at = [], -1
    for token in stream:
        at += min(token + 1, 255)
        if token < 255:
            out.append(at)
    check(stream[-1] < 255, "corrupt", "the last token is 255")
    return out


def rice(stream: bytes, span: int, keys: Sequence[int]) -> list[int]:
    """Return the positions of a `rice` stream (§6.5)."""
    reader = Reader(stream)
    classes = reader.classes(keys, span)
    heads = [reader.head() for _ in classes]
    out = []
    sequences = reader.rice([head[:2] for head in heads])
    for head, numbers, members in zip(heads, sequences, classes, strict=True):
        out += [members[i] for i in subset(head, numbers, len(members))]
    return sorted(out)


def tiles(stream: bytes, span: int) -> list[int]:
    """Return the positions of a `tiles` stream (§6.6)."""
    reader = Reader(stream)
    n_columns, first = reader.number(), reader.number()
    valid = 2 <= n_columns <= span and first < n_columns
    check(valid, "corrupt", f"tiles of {n_columns} columns, starting at {first}")
    n_rows = -(-(first + span) // n_columns)
    (row_bands, row_k), (column_bands, column_k) = (
        (reader.number(), reader.number()) for _ in range(2)
    )
    valid = 1 <= row_bands <= 16 and 1 <= column_bands <= 16
    check(valid, "corrupt", f"{row_bands} and {column_bands} bands")
    heads = [reader.head() for _ in range(row_bands * column_bands)]
    lengths = [(n_rows, row_k), (n_columns, column_k), *(head[:2] for head in heads)]
    row_labels, column_labels, *sequences = reader.rice(lengths)
    valid = max(row_labels) < row_bands and max(column_labels) < column_bands
    check(valid, "corrupt", "a label is not the number of a band")
    out = []
    for number, (head, numbers) in enumerate(zip(heads, sequences, strict=True)):
        band, other = divmod(number, column_bands)
        rows = [r for r in range(n_rows) if row_labels[r] == band]
        columns = [c for c in range(n_columns) if column_labels[c] == other]
        for cell in subset(head, numbers, len(rows) * len(columns)):
            row, column = divmod(cell, len(columns))
            out.append(rows[row] * n_columns + columns[column] - first)
    check(not out or min(out) >= 0, "corrupt", "a position before the chunk")
    return sorted(out)


def positions(index: str, stream: bytes, nnz: int, span: int, keys: Sequence[int]) -> list[int]:
    """Return the touched positions of a chunk, relative to its first element (§6)."""
    if index == "bitmap":
        out = [p for p in range(8 * len(stream)) if stream[p // 8] >> p % 8 & 1]
    elif index == "gaps":
        out = gaps(stream)
    else:
        out = rice(stream, span, keys) if index == "rice" else tiles(stream, span)
    check(len(out) == nnz, "corrupt", f"{len(out)} positions instead of {nnz}")
    check(out[-1] < span, "corrupt", "a position beyond the chunk")
    return out


def steps(stream: bytes, nnz: int, width: int, keys: Sequence[int]) -> list[int]:
    """Return the codes of a `steps` stream (§7.3)."""
    reader = Reader(stream)
    classes = reader.classes(keys, nnz)
    heads, lengths = [], []
    for members in classes:
        n_gaps, k, r = head = reader.head()
        n_excesses = len(members) - n_gaps if r else n_gaps
        heads.append(head)
        lengths += [(n_gaps, k), (n_excesses, reader.number())]
    signs = iter(reader.packed(nnz, 1))
    sequences = reader.rice(lengths)
    out = [0] * nnz
    for i, (head, members) in enumerate(zip(heads, classes, strict=True)):
        units = [0] * len(members)
        chosen = subset(head, sequences[2 * i], len(members))
        for j, excess in zip(chosen, sequences[2 * i + 1], strict=True):
            units[j] = excess + 1
        for j, u in zip(members, units, strict=True):
            out[j] = 2 * u + next(signs) + 1
    check(max(out) < 1 << min(8 * width, 32), "corrupt", "a code is too large")
    return out


def scaled(symbols: bytes, lower: bytes, width: int) -> list[int]:
    """Return the codes of the two streams of `scaled` (§7.4)."""
    check(max(symbols) <= min(63, 16 * width - 1), "corrupt", "a symbol is too large")
    reader = Reader(lower)
    out = list(symbols)
    for k in range(1, 31):
        mine = [i for i, symbol in enumerate(symbols) if symbol // 2 - 1 == k]
        for i, bits in zip(mine, reader.packed(len(mine), k), strict=True):
            out[i] = (2 + symbols[i] % 2) << k | bits
    reader.end()
    return out


def codes(
    packing: str, streams: list[bytes], nnz: int, width: int, keys: Sequence[int]
) -> list[int]:
    """Return the codes of a chunk (§7)."""
    if packing == "planes":
        return [int.from_bytes(bytes(code), "little") for code in zip(*streams, strict=True)]
    if packing == "steps":
        return steps(streams[0], nnz, width, keys)
    return scaled(streams[0], streams[1], width)


def new_bits(code: int, before: int, values: str, width: int, is_float: bool) -> int:
    """Return the bits of an element after the change by a code (§7.1, §7.2)."""
    if values == "target":
        return code
    top, half = (1 << 8 * width) - 1, 1 << 8 * width - 1

    def ordered(x: int) -> int:
        return x if not is_float else x + half if x < half else top - x

    d = code // 2 if code % 2 == 0 else -(code + 1) // 2
    y = (ordered(before) + d) & top
    return y if not is_float else y - half if y >= half else top - y

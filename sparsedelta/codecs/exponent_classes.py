"""Classes of a span's elements by their exponent before the change (FORMAT §6.2).

The rank of an element is the number of elements of its class that precede it. In numpy a class is a bitmap
over the span, with the number of elements in it up to each word. Only touched positions are converted to
ranks and back. The compiled kernels count the elements of each class while they read the span.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from sparsedelta.codecs import kernels
from sparsedelta.codecs.bitpack import blocks
from sparsedelta.codecs.context import Bits, Positions, StartBits
from sparsedelta.codecs.subsets import others
from sparsedelta.errors import Corrupt

Words: TypeAlias = npt.NDArray[np.uint64]
Keys: TypeAlias = npt.NDArray[np.uint8]

N_KEYS = 256
NEXT, END, RANK, REST = range(4)  # the fields of ``Class`` in kernels/_native.c
_SLACK = 16  # zero bytes after each bitmap, which the kernels require
MAX_THRESHOLDS = 15
_BLOCK_ELEMENTS = 1 << 18
_SAMPLE_PIECES, _PIECE_ELEMENTS = 64, 1 << 10
_DENSE = 64  # if more than 1 in 64 elements is wanted, it is quicker to list the whole class


def keys_of(bits: Bits) -> Keys:
    """Return the key of every element: the eight bits below its sign; seven, if it has one byte."""
    if kernels.native:
        keys = np.empty(len(bits), np.uint8)
        kernels.native.keys_of(np.ascontiguousarray(bits), keys)
        return keys
    if bits.itemsize == 1:
        all_bits: Keys = bits & np.uint8(127)
        return all_bits
    upper: Keys = (bits >> bits.dtype.type(8 * bits.itemsize - 9)).astype(np.uint8)
    return upper


def keys_at(before: StartBits, positions: Positions, span: int) -> Keys:
    """Return the keys of the elements at ``positions``."""
    keys = np.empty(len(positions), np.uint8)
    for start, low, high in _edges(positions, span):
        if high > low:
            bits = before(start, min(_BLOCK_ELEMENTS, span - start))
            keys[low:high] = keys_of(bits[positions[low:high] - np.uint32(start)])
    return keys


def class_table(thresholds: Sequence[int]) -> npt.NDArray[np.uint8]:
    """Return the class of every key: the number of thresholds that are not above it."""
    return np.searchsorted(np.array([*thresholds], np.int64), np.arange(N_KEYS), "right").astype(
        np.uint8
    )


def class_words(before: StartBits, span: int, thresholds: Sequence[int]) -> npt.NDArray[np.uint64]:
    """Return a bitmap of the elements of each class: ``(n_classes, ceil(span / 64))``."""
    n_words = -(-span // 64)
    below = np.zeros((len(thresholds) + 1, n_words), "<u8")
    rows = below.view(np.uint8)
    inside = np.empty(_BLOCK_ELEMENTS, np.bool_)
    for start in range(0, span, _BLOCK_ELEMENTS):
        n = min(_BLOCK_ELEMENTS, span - start)
        keys = keys_of(before(start, n))
        for row, threshold in zip(rows, thresholds, strict=False):
            np.less(keys, np.uint8(threshold), out=inside[:n])
            row[start // 8 : start // 8 + -(-n // 8)] = np.packbits(inside[:n], bitorder="little")
    last = np.full(8 * n_words, 255, np.uint8)
    last[span // 8 :] = 0
    last[span // 8 : span // 8 + 1] = (1 << span % 8) - 1
    rows[-1] = last
    for number in range(len(thresholds), 0, -1):
        below[number] ^= below[number - 1]
    return below


class ElementClass:
    """The elements of one class, ascending."""

    def __init__(self, words: Words) -> None:
        self._words = words
        self._ends = np.cumsum(np.bitwise_count(words), dtype=np.uint32)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def ranks(self, positions: Positions) -> Positions:
        """Return the ranks of elements of the class."""
        number = positions >> 6
        word = self._words[number]
        before: Positions = self._ends[number] - np.bitwise_count(word)
        lower = (np.uint64(1) << (positions & 63).astype(np.uint64)) - np.uint64(1)
        before += np.bitwise_count(word & lower)
        return before

    def positions(self, ranks: Positions) -> Positions:
        """Return the elements with these ranks, which ascend and are below the length of the class."""
        if len(ranks) * _DENSE > 64 * len(self._words):
            everything = np.unpackbits(self._words.view(np.uint8), bitorder="little")
            listed: Positions = np.flatnonzero(everything.view(np.bool_))[ranks].astype(np.uint32)
            return listed
        number: Positions = np.searchsorted(self._ends, ranks, "right").astype(np.uint32)
        word = self._words[number]
        left = (ranks - (self._ends[number] - np.bitwise_count(word))).astype(np.uint8)
        result: Positions = number << np.uint32(6)
        for half in (32, 16, 8, 4, 2, 1):
            n_low = np.bitwise_count(word & np.uint64((1 << half) - 1))
            upper = left >= n_low
            left -= n_low * upper
            shift = upper * np.uint8(half)
            word >>= shift
            result += shift
        return result


@dataclass(frozen=True, slots=True)
class Choice:
    """Elements of a span, chosen by their ranks in classes of the span's elements.

    Attributes:
        span: number of elements of the span.
        nnz: number of chosen elements.
        thresholds: the lowest keys of all classes but the first.
        listed: for each class, ascending ranks, and whether all other elements are meant instead.
    """

    span: int
    nnz: int
    thresholds: Sequence[int]
    listed: Sequence[tuple[Positions, bool]]

    def find(self, before: StartBits) -> tuple[Positions, Keys | None]:
        """Return the elements, ascending, and their keys if these are known.

        Args:
            before: the bits of the span before the change.

        Raises:
            Corrupt: the number of elements differs from ``nnz``, or a rank is too high for its class.
        """
        return self._find_compiled(before) if kernels.native else (self._find(before), None)

    def _find_compiled(self, before: StartBits) -> tuple[Positions, Keys]:
        ends = [int(ranks[-1]) + 1 if len(ranks) else 0 for ranks, _ in self.listed]
        state = np.zeros((len(ends), 4), np.int64)
        state[:, END], state[:, REST] = ends, [of_rest for _, of_rest in self.listed]
        edges = np.cumsum([0, *(end // 8 + _SLACK for end in ends)])
        state[:, NEXT], bitmaps = edges[:-1], np.zeros(int(edges[-1]), np.uint8)
        kernel: Any = kernels.native
        for (ranks, _), bitmap in zip(self.listed, np.split(bitmaps, edges[1:-1]), strict=True):
            kernel.put_bits(ranks, bitmap)
        positions, keys = np.empty(self.nnz, np.uint32), np.empty(self.nnz, np.uint8)
        found = 0
        for start in range(0, self.span, _BLOCK_ELEMENTS):
            bits = before(start, min(_BLOCK_ELEMENTS, self.span - start))
            found = kernel.find_chosen(
                bits, start, bytes(self.thresholds), state, bitmaps, positions, keys, found
            )
        if found != self.nnz or (state[:, RANK] < ends).any():
            raise self.error()
        return positions, keys

    def _find(self, before: StartBits) -> Positions:
        parts, left = [], self.nnz
        classes = class_words(before, self.span, self.thresholds)
        for words, (ranks, of_rest) in zip(classes, self.listed, strict=True):
            members = ElementClass(words)
            if len(ranks) and ranks[-1] >= len(members):
                raise self.error()
            chosen = others(ranks, len(members)) if of_rest else ranks
            left -= len(chosen)
            if left < 0:
                break
            parts.append(members.positions(chosen))
        if left:
            raise self.error()
        positions = np.concatenate(parts)
        # Stable sort is Timsort. It only merges here, because the positions of each class are sorted already.
        positions.sort(kind="stable")
        return positions

    def error(self) -> Corrupt:
        """Return the error of a choice that does not fit the span's elements."""
        return Corrupt(f"index stream does not hold exactly {self.nnz} positions")


def ranks_by_class(
    before: StartBits, positions: Positions, keys: Keys, span: int, thresholds: Sequence[int]
) -> Iterator[tuple[Positions, int]]:
    """Yield for each class the ranks of its elements at ``positions``, and the number of all its elements."""
    counts = class_counts(keys, thresholds)
    if kernels.native is None:
        number = class_table(thresholds)[keys]
        ordered = positions[np.argsort(number, kind="stable")]
        parts = np.split(ordered, np.cumsum(counts[:-1]))
        for words, part in zip(class_words(before, span, thresholds), parts, strict=True):
            members = ElementClass(words)
            yield members.ranks(part), len(members)
        return
    ranks, state = np.empty(len(positions), np.uint32), class_state(counts)
    for start, low, high in _edges(positions, span):
        bits = before(start, min(_BLOCK_ELEMENTS, span - start))
        kernels.native.rank_chosen(
            bits, start, bytes(thresholds), state, positions[low:high], ranks
        )
    n_members = state[:, RANK].tolist()
    yield from zip(np.split(ranks, np.cumsum(counts[:-1])), n_members, strict=True)


def class_state(counts: Sequence[int]) -> npt.NDArray[np.int64]:
    """Return the state of the classes for the kernels, which list ``counts`` elements of each."""
    state = np.zeros((len(counts), 4), np.int64)
    state[:, END] = np.cumsum(counts)
    state[1:, NEXT] = state[:-1, END]
    return state


def key_counts(keys: Keys) -> npt.NDArray[np.int64]:
    """Return the number of elements with each key, (256,)."""
    counts = np.zeros(N_KEYS, np.int64)
    if kernels.native:
        kernels.native.count_keys(keys, counts)
    else:
        for block in blocks(len(keys)):
            counts += np.bincount(keys[block], minlength=N_KEYS)
    return counts


def class_counts(keys: Keys, thresholds: Sequence[int]) -> list[int]:
    """Return the number of elements in each class, from their keys."""
    counts: list[int] = np.add.reduceat(key_counts(keys), [0, *thresholds]).tolist()
    return counts


def _edges(positions: Positions, span: int) -> Iterator[tuple[int, int, int]]:
    starts = range(0, span, _BLOCK_ELEMENTS)
    # uint32, because otherwise searchsorted copies the positions
    edges = np.searchsorted(positions, np.array([*starts, span], np.uint32)).tolist()
    return zip(starts, edges, edges[1:], strict=False)


def sample_keys(before: StartBits, span: int) -> npt.NDArray[np.int64]:
    """Return an estimate of the number of elements with each key, from samples spread over the span."""
    n_pieces = min(_SAMPLE_PIECES, max(1, span // _PIECE_ELEMENTS))
    size = (
        min(_PIECE_ELEMENTS, span)
        if span > _SAMPLE_PIECES * _PIECE_ELEMENTS
        else -(-span // n_pieces)
    )
    counts, n_seen = np.zeros(N_KEYS, np.int64), 0
    for start in np.linspace(0, span - size, n_pieces).astype(np.int64).tolist():
        counts += key_counts(keys_of(before(start, size)))
        n_seen += size
    return counts * span // n_seen


def merge_keys(
    statistics: Sequence[npt.NDArray[np.int64]],
    cost: Callable[..., float],
    *,
    most: int,
    overhead: float,
) -> list[int]:
    """Return thresholds between classes of adjacent keys; classes are merged as long as that saves bits.

    Args:
        statistics: arrays ``(256,)``, one number for each key. The statistics of a class are the sums over
            its keys. A key with zeros in all of them has no elements.
        cost: returns the bits of one class, from its statistics.
        most: the greatest number of classes.
        overhead: bits that each class adds.
    """
    live = np.flatnonzero(np.any(statistics, axis=0))
    classes = list(zip(*(numbers[live].tolist() for numbers in statistics), strict=True))
    costs = [cost(*one) + overhead for one in classes]
    merged = [_joined(a, b) for a, b in itertools.pairwise(classes)]
    merged_costs = [cost(*one) + overhead for one in merged]
    gains = [a + b - c for a, b, c in zip(costs, costs[1:], merged_costs, strict=False)]
    first = live.tolist()
    while gains:
        gain = max(gains)
        if gain < 0 and len(first) <= most:
            break
        i = gains.index(gain)
        classes[i : i + 2], costs[i : i + 2] = [merged[i]], [merged_costs[i]]
        del first[i + 1], merged[i], merged_costs[i], gains[i]
        for j in (i - 1, i):
            if 0 <= j < len(merged):
                merged[j] = _joined(classes[j], classes[j + 1])
                merged_costs[j] = cost(*merged[j]) + overhead
                gains[j] = costs[j] + costs[j + 1] - merged_costs[j]
    return first[1:]


def _joined(one: tuple[float, ...], other: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(map(operator.add, one, other))


def choice_bits(some: float, others: float) -> float:
    """Return the bits that say which of ``some + others`` things are the ``some``."""
    if some <= 0 or others <= 0:
        return 0.0
    n = some + others
    return n * math.log2(n) - some * math.log2(some) - others * math.log2(others)


def total_choice_bits(some: npt.ArrayLike, others: npt.ArrayLike) -> float:
    """Return the sum of ``choice_bits`` over the items of two arrays."""
    parts = np.stack([np.asarray(some, float), np.asarray(others, float)])
    total = parts.sum(axis=0)
    return float(_times_log2(total).sum() - _times_log2(parts).sum())


def _times_log2(numbers: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return numbers * np.log2(np.maximum(numbers, 1))


def read_thresholds(stream: bytes, *, classes: bool) -> tuple[bytes, int]:
    """Return the thresholds at the beginning of a stream, and the offset after them.

    Raises:
        Corrupt: they do not ascend from 1, there are too many, or the stream is too short.
    """
    at = 1 + stream[0] if stream else 1
    thresholds = stream[1:at]
    ascend = all(a < b for a, b in itertools.pairwise(b"\0" + thresholds))
    if at > len(stream) or not ascend:
        raise Corrupt("thresholds of a stream do not ascend")
    if len(thresholds) > (MAX_THRESHOLDS if classes else 0):
        raise Corrupt(f"a stream has {len(thresholds)} thresholds, which its chunk does not allow")
    return thresholds, at

"""``steps``: a packing for differences that are mostly one unit; most codes take less than a byte (FORMAT §7.3).

Signs are packed bits. Rice codes state which steps are longer than one unit, and by how much. Both depend on the
element's exponent before the change. So the stream is smaller if elements are grouped in classes by exponent.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from sparsedelta.codecs import kernels
from sparsedelta.codecs.bitpack import (
    MAX_LOW_BITS,
    Numbers,
    best_low_bits,
    blocks,
    decode_rice,
    encode_rice,
    pack,
    read_number,
    unpack,
    write_number,
)
from sparsedelta.codecs.context import Bits, Sizes, Stream
from sparsedelta.codecs.exponent_classes import (
    END,
    MAX_THRESHOLDS,
    N_KEYS,
    RANK,
    Keys,
    choice_bits,
    class_counts,
    class_state,
    class_table,
    merge_keys,
    read_thresholds,
)
from sparsedelta.codecs.packings.contract import ValuePacking
from sparsedelta.codecs.subsets import encode_subset, read_subset
from sparsedelta.errors import Corrupt

_CLASS_BITS = 40  # size of what a class needs besides its codes
_MOST_CLASSES = MAX_THRESHOLDS + 1
_FEWEST = 256  # codes; with fewer, classes cannot save enough
_NOWHERE = (1 << 32) - 1  # marks the end of a class for the kernels
_LONG = 16  # if most codes are higher than this, other packings are smaller


class _Steps(ValuePacking):
    """Stores the signs, which steps are longer than one unit, and the lengths of these."""

    has_classes = True

    def stream_sizes(self, n_bytes: Sizes, nnz: Sizes, width: int) -> Sequence[Sizes]:
        return [n_bytes]

    def encode(
        self, codes: Bits, keys: Keys | None, thresholds: Sequence[int] | None = None
    ) -> Sequence[Stream] | None:
        if keys is not None and len(codes) < _FEWEST:
            return None
        if not codes.all() or int(codes.max()) >> 32:
            return None
        if 2 * np.count_nonzero(codes > _LONG) > len(codes):
            return None
        width = codes.itemsize
        codes = codes.astype(f"<u{min(width, 4)}")  # a copy
        codes -= 1
        classes: Sequence[int] = []
        counts = [len(codes)]
        if keys is not None:
            classes = thresholds or _choose_classes(keys, codes)
            if not classes:
                return None
            counts = class_counts(keys, classes)
            codes = _sorted(codes, keys, classes, counts)
        head = bytearray([len(classes), *classes])
        sequences: list[tuple[Numbers, int]] = []
        for start, end in itertools.pairwise(itertools.accumulate(counts, initial=0)):
            long, excess = _long(codes[start:end])
            subset_head, sequence = encode_subset(long, end - start)
            k = best_low_bits(excess)
            head += subset_head + write_number(k)
            sequences += [sequence, (excess, k)]
        signs = pack(codes, 1).tobytes()
        stream = np.frombuffer(bytes(head) + signs + encode_rice(sequences), np.uint8)
        return [stream] if self.possible(len(stream), len(codes), width) else None

    def possible(self, n_bytes: Sizes, nnz: Sizes, width: int) -> Sizes:
        return (n_bytes >= 4) & (n_bytes <= (width + 1) * nnz + (1 << 15))

    def decode(self, streams: Sequence[bytes], nnz: int, width: int, keys: Keys | None) -> Bits:
        (stream,) = streams
        thresholds, at = read_thresholds(stream, classes=keys is not None)
        counts = class_counts(keys, thresholds) if thresholds and keys is not None else [nnz]
        heads, lengths = [], []
        for n in counts:
            head, at = read_subset(stream, at)
            k, at = read_number(stream, at)
            n_long = n - head.n_gaps if head.of_rest else head.n_gaps
            if n_long < 0 or k > MAX_LOW_BITS:
                raise Corrupt(f"value stream has {n_long} long steps of {n}, or parameter {k}")
            heads.append(head)
            lengths += [head.length, (n_long, k)]
        n_sign_bytes = -(-nnz // 8)
        packed = np.frombuffer(stream[at : at + n_sign_bytes], np.uint8)
        if len(packed) != n_sign_bytes:
            raise Corrupt("value stream ends within its signs")
        sequences = decode_rice(stream[at + n_sign_bytes :], lengths)
        if kernels.native:
            listed = [h.chosen(g, n) for h, g, n in zip(heads, sequences[::2], counts, strict=True)]
            return _joined(packed, nnz, width, keys, thresholds, counts, listed, sequences[1::2])
        codes = unpack(packed, nnz, 1).astype(f"<u{width}")
        codes += 1
        start = 0
        for n, head, gaps, excess in zip(
            counts, heads, sequences[::2], sequences[1::2], strict=True
        ):
            _lengthen(codes[start : start + n], head.chosen(gaps, n), excess)
            start += n
        if not thresholds or keys is None:
            return codes
        ordered, codes = codes, np.empty_like(codes)
        for where, to in _by_class(class_table(thresholds)[keys], counts):
            codes[where] = ordered[to]
        return codes


def _sorted(codes: Bits, keys: Keys, thresholds: Sequence[int], counts: list[int]) -> Bits:
    """Return the codes class by class."""
    result = np.empty_like(codes)
    table = class_table(thresholds)
    if kernels.native:
        places = np.cumsum([0, *counts[:-1]], dtype=np.int64)
        kernels.native.sort_codes(codes, keys, table, places, result)
        return result
    for where, to in _by_class(table[keys], counts):
        result[to] = codes[where]
    return result


def _long(codes: Bits) -> tuple[Numbers, Numbers]:
    """Return the places of the steps longer than one unit, and their units above two."""
    if kernels.native:
        long, excess = np.empty((2, len(codes)), np.uint32)
        n = kernels.native.long_steps(codes, long, excess)
        return long[:n], excess[:n]
    beyond = codes >> 1  # units beyond the first
    long = np.flatnonzero(beyond).astype(np.uint32)
    return long, beyond[long].astype(np.uint32) - np.uint32(1)


def _joined(
    signs: Stream,
    nnz: int,
    width: int,
    keys: Keys | None,
    thresholds: Sequence[int],
    counts: list[int],
    long: Sequence[Numbers],
    excess: Sequence[Numbers],
) -> Bits:
    """Return the codes from the signs, and the long steps of each class and their lengths, by the compiled kernels."""
    codes = np.empty(nnz, f"<u{width}")
    state = class_state([len(one) for one in long])
    state[:, : END + 1] += np.arange(len(long))[
        :, np.newaxis
    ]  # every earlier class ends with a mark
    state[:, RANK] = np.cumsum([0, *counts[:-1]])
    with_keys = keys if thresholds and keys is not None else b""
    kernels.native.join_steps(  # type: ignore[union-attr]
        signs, with_keys, class_table(thresholds), state,
        _ended(long, _NOWHERE), _ended(excess, 0), codes,
    )  # fmt: skip
    return codes


def _ended(parts: Sequence[Numbers], mark: int) -> Numbers:
    """Return the parts end to end, with a mark after each."""
    end = np.array([mark], np.uint32)
    return np.concatenate([piece for part in parts for piece in (part, end)])


def _lengthen(codes: Bits, long: Numbers, excess: Numbers) -> None:
    """Add to the codes at ``long`` their units beyond the first."""
    if not len(long):
        return
    more = excess + np.uint64(1)
    more <<= np.uint64(1)
    more += codes[long]
    n_bits = min(8 * codes.itemsize, 32)
    if int(more.max()) >> n_bits:
        raise Corrupt(f"value stream holds a code of more than {n_bits} bits")
    codes[long] = more


def _by_class(number: Keys, counts: list[int]) -> Iterator[tuple[npt.NDArray[np.intp], slice]]:
    """Yield, piece by piece, the places of elements before and after sorting by class."""
    next_free = list(itertools.accumulate(counts, initial=0))
    for block in blocks(len(number)):
        part = number[block]
        order = np.argsort(part, kind="stable")
        order += block.start
        at = 0
        for one, n in enumerate(np.bincount(part).tolist()):
            if n:
                yield order[at : at + n], slice(next_free[one], next_free[one] + n)
            at += n
            next_free[one] += n


def _choose_classes(keys: Keys, codes: Bits) -> list[int]:
    # For each key: number of steps, number of long steps, and the sum of their units above two.
    sums = np.zeros((3, N_KEYS), np.int64)
    if kernels.native:
        kernels.native.step_statistics(codes, keys, sums)
    for block in blocks(0 if kernels.native else len(keys)):
        beyond = codes[block] >> 1
        excess = np.maximum(beyond, 1) - 1
        for row, weights in zip(sums, (None, beyond > 0, excess), strict=True):
            row += np.bincount(keys[block], weights, minlength=N_KEYS).astype(np.int64)
    n, n_long, longer = sums
    return merge_keys((n, n_long, longer), _cost, most=_MOST_CLASSES, overhead=_CLASS_BITS)


def _cost(n: float, n_long: float, excess: float) -> float:
    """Return the estimated bits of a class of ``n`` steps; the lengths are assumed to be geometric."""
    return choice_bits(n - n_long, n_long) + choice_bits(excess, n_long)


STEPS = _Steps()

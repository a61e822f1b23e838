"""``steps`` and ``exponent_steps``: codes mostly of one unit up or down, below a byte (FORMAT §7.4).

Signs are plain bits; which steps are longer than one unit, and by how much, are Rice codes. How many are
longer, and how long, goes with the base's exponent: ``exponent_steps`` sorts the steps by it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from sparsedelta.codecs.bits import (
    MAX_LOW_BITS,
    Numbers,
    best_low_bits,
    decode_rice,
    encode_rice,
    pack,
    read_number,
    unpack,
    write_number,
)
from sparsedelta.codecs.classes import (
    Keys,
    choice_bits,
    class_table,
    merge_keys,
    read_thresholds,
)
from sparsedelta.codecs.site import Bits, Stream
from sparsedelta.codecs.subsets import encode_subset, read_subset
from sparsedelta.errors import Corrupt

_CLASS_BITS = 40  # what a class costs besides its codes
_MOST_CLASSES = 32
_FEWEST = 256  # codes; of fewer the base cannot save enough
_LONG = 16  # a code; where most are above it others do better


class _Steps:
    """Signs; which steps are longer than one unit; how much longer."""

    is_quick = False
    states_size = True

    def __init__(self, *, needs_base: bool) -> None:
        self.needs_base = needs_base

    def stream_sizes(self, n_bytes: int, nnz: int, width: int) -> Sequence[int]:
        return [n_bytes]

    def encode(self, codes: Bits, keys: Keys | None) -> Sequence[Stream] | None:
        if self.needs_base and (keys is None or len(codes) < _FEWEST):
            return None
        if not codes.all() or int(codes.max()) >> 32:
            return None
        if 2 * np.count_nonzero(codes > _LONG) > len(codes):
            return None
        codes = codes - codes.dtype.type(1)
        beyond = (codes >> 1).astype(np.uint32)  # units beyond the first
        keys = keys if self.needs_base and keys is not None else np.zeros(len(codes), np.uint8)
        thresholds = _choose_classes(keys, beyond)
        if self.needs_base and not thresholds:
            return None
        number = class_table(thresholds)[keys]
        order = np.argsort(number, kind="stable")
        signs = (codes & 1)[order]
        beyond = beyond[order]
        ends = np.cumsum(np.bincount(number, minlength=len(thresholds) + 1)).tolist()
        head = bytearray([len(thresholds), *thresholds])
        sequences: list[tuple[Numbers, int]] = []
        for start, end in itertools.pairwise([0, *ends]):
            part = beyond[start:end]
            long = np.flatnonzero(part).astype(np.uint32)
            subset_head, sequence = encode_subset(long, len(part))
            excess = part[long] - np.uint32(1)
            k = best_low_bits(excess)
            head += subset_head + write_number(k)
            sequences += [sequence, (excess, k)]
        packed = pack(signs, 1).tobytes()
        stream = np.frombuffer(bytes(head) + packed + encode_rice(sequences), np.uint8)
        return [stream] if self.possible(len(stream), len(codes), codes.itemsize) else None

    def possible(self, n_bytes: int, nnz: int, width: int) -> bool:
        return 4 <= n_bytes <= (width + 1) * nnz + (1 << 15)

    def decode(self, streams: Sequence[bytes], nnz: int, width: int, keys: Keys | None) -> Bits:
        (stream,) = streams
        thresholds, at = read_thresholds(stream)
        if not self.needs_base:
            if thresholds:
                raise Corrupt("value stream of steps has classes")
            keys = np.zeros(nnz, np.uint8)
        elif keys is None:
            raise ValueError("a stream of exponent_steps needs the base")
        number = class_table(thresholds)[keys]
        counts = np.bincount(number, minlength=len(thresholds) + 1).tolist()
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
        signs = unpack(packed, nnz, 1)
        sequences = decode_rice(stream[at + n_sign_bytes :], lengths)
        ordered = np.zeros(nnz, np.uint64)
        start = 0
        for n, head, gaps, excess in zip(
            counts, heads, sequences[::2], sequences[1::2], strict=True
        ):
            ordered[start : start + n][head.chosen(gaps, n)] = excess + np.uint64(1)
            start += n
        ordered <<= np.uint64(1)
        ordered += signs
        ordered += np.uint64(1)
        if int(ordered.max()) >> 8 * width:
            raise Corrupt(f"value stream holds a code of more than {width} bytes")
        codes = np.empty(nnz, f"<u{width}")
        codes[np.argsort(number, kind="stable")] = ordered
        return codes


def _choose_classes(keys: Keys, beyond: Numbers) -> list[int]:
    n, n_long, excess = (
        np.bincount(keys, weights, minlength=256).astype(np.int64)
        for weights in (None, beyond > 0, np.maximum(beyond, 1) - np.uint32(1))
    )
    return merge_keys((n, n_long, excess), _cost, most=_MOST_CLASSES, overhead=_CLASS_BITS)


def _cost(n: float, n_long: float, excess: float) -> float:
    """Return the bits of classes of ``n`` steps: which are long, and by how much, if geometric."""
    return choice_bits(n - n_long, n_long) + choice_bits(excess, n_long)


STEPS, EXPONENT_STEPS = _Steps(needs_base=False), _Steps(needs_base=True)

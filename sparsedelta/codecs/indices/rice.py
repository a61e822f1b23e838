"""``rice``: gaps between touched positions as Rice codes, with or without classes (FORMAT §6.5).

In a small training step, an element changes if its step exceeds half the distance to the next value. So elements
with a small exponent change more often. Classes group elements by exponent to use this. The base is then required
for decoding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from sparsedelta.codecs import kernels
from sparsedelta.codecs.bitpack import decode_rice, encode_rice
from sparsedelta.codecs.context import NO_CONTEXT, ChunkContext, Positions, Sizes, StartBits, Stream
from sparsedelta.codecs.exponent_classes import (
    Choice,
    choice_bits,
    key_counts,
    keys_at,
    merge_keys,
    ranks_by_class,
    read_thresholds,
    sample_keys,
    total_choice_bits,
)
from sparsedelta.codecs.indices.contract import IndexEncoding
from sparsedelta.codecs.subsets import encode_subset, read_subset
from sparsedelta.errors import Corrupt

_FEWEST = 256  # touched positions; with fewer, classes cannot save enough
_HEAD_BYTES, _MOST_GAP_BYTES = (
    16,
    5,
)  # a gap never takes more bytes with the parameter that fits best
_CLASS_BITS = 32  # size of what a class needs besides its gaps
_MOST_CLASSES = 8  # each takes time in proportion to the span, and more classes save less than 1 %
# Classes are used if they shrink the stream at least to this ratio. Otherwise they are not worth the time.
_WORTH = 0.97


class _Rice(IndexEncoding):
    """The touched positions of each class as a subset; without classes, there is one class."""

    has_classes = True

    def is_quick(self, nnz: int, span: int) -> bool:
        return nnz * 100 <= span or nnz == span  # if all are touched: two bytes

    def worth_trying(self, nnz: int, span: int) -> bool:
        return True

    def encode(
        self, positions: Positions, span: int, context: ChunkContext = NO_CONTEXT
    ) -> Stream | None:
        if kernels.native and not context.classes and 2 * len(positions) <= span:
            whole = np.empty(_HEAD_BYTES + _MOST_GAP_BYTES * len(positions), np.uint8)
            return whole[: kernels.native.put_rice(positions, whole)]
        thresholds: Sequence[int] = []
        parts: Iterator[tuple[Positions, int]] = iter([(positions, span)])
        if context.classes:
            if context.before is None or len(positions) < _FEWEST:
                return None
            keys = (
                keys_at(context.before, positions, span) if context.keys is None else context.keys
            )
            thresholds = context.thresholds or _choose_classes(context.before, keys, span)
            if not thresholds:
                return None
            parts = ranks_by_class(context.before, positions, keys, span, thresholds)
        head = bytearray([len(thresholds), *thresholds])
        sequences = []
        for chosen, n in parts:
            part, sequence = encode_subset(chosen, n)
            head += part
            sequences.append(sequence)
        return np.frombuffer(bytes(head) + encode_rice(sequences), np.uint8)

    def possible(self, n_bytes: Sizes, nnz: Sizes, span: Sizes) -> Sizes:
        return (n_bytes >= 2) & (n_bytes <= span // 4 + (1 << 15))

    def decode(
        self, stream: bytes, nnz: int, span: int, context: ChunkContext = NO_CONTEXT
    ) -> Positions:
        found = self.open(stream, nnz, span, classes=context.classes)
        if not isinstance(found, Choice):
            return found
        if context.before is None:
            raise ValueError("classes need the bits before the change")
        return found.find(context.before)[0]

    def open(self, stream: bytes, nnz: int, span: int, *, classes: bool) -> Positions | Choice:
        thresholds, at = read_thresholds(stream, classes=classes)
        heads = []
        for _ in range(len(thresholds) + 1):
            head, at = read_subset(stream, at)
            heads.append(head)
        sequences = decode_rice(stream[at:], [head.length for head in heads])
        if not thresholds:
            positions = heads[0].chosen(sequences[0], span)
            if len(positions) != nnz:
                raise Corrupt(f"index stream does not hold exactly {nnz} positions")
            return positions
        listed = [
            (head.listed(gaps, span), head.of_rest)
            for head, gaps in zip(heads, sequences, strict=True)
        ]
        return Choice(span, nnz, thresholds, listed)


def _choose_classes(before: StartBits, keys: npt.NDArray[np.uint8], span: int) -> list[int]:
    """Return thresholds between classes of different density; none if classes would save too little."""
    touched = key_counts(keys)
    untouched = np.maximum(sample_keys(before, span), touched) - touched
    most = _WORTH * choice_bits(int(untouched.sum()), len(keys))
    if total_choice_bits(untouched, touched) > most:
        return []
    thresholds = merge_keys(
        (untouched, touched), choice_bits, most=_MOST_CLASSES, overhead=_CLASS_BITS
    )
    edges = [0, *thresholds]
    bits = total_choice_bits(np.add.reduceat(untouched, edges), np.add.reduceat(touched, edges))
    return thresholds if bits + _CLASS_BITS * len(edges) < most else []


RICE = _Rice()

"""``exponent``: gaps among the elements whose base is of like magnitude, as Rice codes (FORMAT §6.5).

When steps are small an element changes if its step exceeds half its spacing, so the exponents of the
base tell which elements are likely to. The base is needed to read the positions.
"""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt

from sparsedelta.codecs.bitpack import decode_rice, encode_rice
from sparsedelta.codecs.context import NO_CONTEXT, BaseBits, ChunkContext, Positions, Stream
from sparsedelta.codecs.exponent_classes import (
    N_KEYS,
    ElementClass,
    choice_bits,
    class_table,
    class_words,
    keys_at,
    merge_keys,
    read_thresholds,
    sample_keys,
    total_choice_bits,
)
from sparsedelta.codecs.subsets import encode_subset, read_subset
from sparsedelta.errors import Corrupt

_CLASS_BITS = 32  # what a class costs besides its gaps
_MOST_CLASSES = 8  # each costs time in proportion to the span, and further ones save under 1 %
_WORTH = 0.97  # of the entropy without classes


class _Exponent:
    """Touched positions as places within classes of elements."""

    is_quick = False
    needs_base = True

    def worth_trying(self, nnz: int, span: int) -> bool:
        return 256 <= nnz < span  # of fewer the base cannot save enough

    def encode(
        self, positions: Positions, span: int, context: ChunkContext = NO_CONTEXT
    ) -> Stream | None:
        if context.base is None:
            return None
        keys = keys_at(context.base, positions, span) if context.keys is None else context.keys
        thresholds = _choose_classes(context.base, keys, span)
        if not thresholds:
            return None
        number = class_table(thresholds)[keys]
        ordered = positions[np.argsort(number, kind="stable")]
        ends = np.cumsum(np.bincount(number, minlength=len(thresholds) + 1)).tolist()
        head = bytearray([len(thresholds), *thresholds])
        sequences = []
        classes = class_words(context.base, span, thresholds)
        for words, (start, end) in zip(classes, itertools.pairwise([0, *ends]), strict=True):
            members = ElementClass(words)
            part, sequence = encode_subset(members.ranks(ordered[start:end]), len(members))
            head += part
            sequences.append(sequence)
        return np.frombuffer(bytes(head) + encode_rice(sequences), np.uint8)

    def possible(self, n_bytes: int, nnz: int, span: int) -> bool:
        return 3 <= n_bytes <= span // 4 + (1 << 15)

    def decode(
        self, stream: bytes, nnz: int, span: int, context: ChunkContext = NO_CONTEXT
    ) -> Positions:
        if context.base is None:
            raise ValueError("an exponent stream needs the base")
        thresholds, at = read_thresholds(stream)
        heads = []
        for _ in range(len(thresholds) + 1):
            head, at = read_subset(stream, at)
            heads.append(head)
        sequences = decode_rice(stream[at:], [head.length for head in heads])
        parts, left = [], nnz
        classes = class_words(context.base, span, thresholds)
        for words, head, gaps in zip(classes, heads, sequences, strict=True):
            members = ElementClass(words)
            chosen = head.chosen(gaps, len(members))
            left -= len(chosen)
            if left < 0:
                break
            parts.append(members.positions(chosen))
        if left:
            raise Corrupt(f"index stream does not hold exactly {nnz} positions")
        positions = np.concatenate(parts)
        # Timsort: those of a class ascend already, what is left is merging.
        positions.sort(kind="stable")
        return positions


def _choose_classes(base: BaseBits, keys: npt.NDArray[np.uint8], span: int) -> list[int]:
    """Return thresholds between classes of unlike density; none if that would save too little."""
    touched = np.bincount(keys, minlength=N_KEYS)
    untouched = np.maximum(sample_keys(base, span), touched) - touched
    most = _WORTH * choice_bits(int(untouched.sum()), len(keys))
    if total_choice_bits(untouched, touched) > most:
        return []
    thresholds = merge_keys(
        (untouched, touched), choice_bits, most=_MOST_CLASSES, overhead=_CLASS_BITS
    )
    edges = [0, *thresholds]
    bits = total_choice_bits(np.add.reduceat(untouched, edges), np.add.reduceat(touched, edges))
    return thresholds if bits + _CLASS_BITS * len(edges) < most else []


EXPONENT = _Exponent()

"""A tensor of the target as something to read, made of the base's while it is read.

Reading goes forward, by blocks, as ``Comparison`` does; one chunk is held at a time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from sparsedelta.codecs.chunk import CHUNK_ELEMENTS, chunk_span
from sparsedelta.codecs.values import VALUE_ENCODINGS, Bits
from sparsedelta.dtypes import DType
from sparsedelta.format.records import TensorSpec
from sparsedelta.tensors.changes import Stage
from sparsedelta.tensors.compare import Source
from sparsedelta.tensors.parallel import Pace


class Made(ABC):
    """A tensor of which one chunk at a time is made, when it is read (a ``Source``)."""

    def __init__(self, name: str, spec: TensorSpec) -> None:
        self.name = name
        self.dtype = spec.dtype
        self.shape = spec.shape
        self.n_bytes = spec.n_bytes
        self.n_elements = spec.n_elements
        self._number = -1
        self._bits: Bits = np.empty(0, spec.dtype.view)

    @abstractmethod
    def make(self, number: int) -> Bits:
        """Return the bits of a chunk."""

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` with the tensor's bytes from ``offset``."""
        chunk_bytes = CHUNK_ELEMENTS * self.dtype.width
        while len(buffer):
            number, start = divmod(offset, chunk_bytes)
            if number != self._number:
                self._bits, self._number = self.make(number), number
            raw = self._bits.view(np.uint8).data[start : start + len(buffer)]
            buffer[: len(raw)] = raw
            buffer = buffer[len(raw) :]
            offset += len(raw)


class MadeTensor(Made):
    """The base's tensor after some changes, applied one after the other.

    Args:
        name: the tensor's.
        spec: the tensor after the last change.
        base: the base's tensor; None: it has none.
        stages: the changes, in order.
        keep: leading elements that come from the base.
        pace: told of every coded byte.
        in_turn: each change was made to what the one before it left; else each to the base.
    """

    def __init__(
        self,
        name: str,
        spec: TensorSpec,
        base: Source | None,
        stages: Sequence[Stage],
        keep: int,
        pace: Pace,
        *,
        in_turn: bool = True,
    ) -> None:
        super().__init__(name, spec)
        self._base = base
        self._stages = stages
        self._keep = keep
        self._pace = pace
        self._in_turn = in_turn

    def make(self, number: int) -> Bits:
        """Return the bits of a chunk."""
        dtype, start = self.dtype, number * CHUNK_ELEMENTS
        # What is cut later is there until then: it may tell how a change is coded.
        stages = [replace(stage, limit=stage.target.n_elements) for stage in self._stages]
        n_elements = max([self.n_elements, *(stage.target.n_elements for stage in stages)])
        keep = stages[0].change.keep if stages else self._keep
        bits = read_chunk(self._base, dtype, n_elements, keep, number)
        base = bits if self._in_turn else bits.copy()

        def before(start: int, n: int) -> Bits:
            return base[start : start + n]

        for stage in stages:
            bits[max(0, stage.change.keep - start) :] = 0
            if stage.chunk(number):
                positions, codes = stage.decode(number, self._pace, before)
                decode = VALUE_ENCODINGS[stage.change.values].decode
                bits[positions] = decode(dtype, bits[positions], codes)
        return bits[: chunk_span(self.n_elements, number)]


def read_chunk(base: Source | None, dtype: DType, n_elements: int, keep: int, number: int) -> Bits:
    """Return the bits of a chunk as they are before a change (FORMAT §4)."""
    start = number * CHUNK_ELEMENTS
    bits = np.zeros(chunk_span(n_elements, number), dtype.view)
    n_kept = min(len(bits), max(0, keep - start))
    if base is not None and n_kept:
        base.read_into(bits[:n_kept].view(np.uint8).data, start * dtype.width)
    return bits

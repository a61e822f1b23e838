"""A tensor of the target as something to read, made of the base's while it is read.

Reading goes forward, by blocks, as ``Comparison`` does; one chunk is held at a time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np

from sparsedelta.codecs.chunks import CHUNK_ELEMENTS, chunk_span
from sparsedelta.codecs.values import VALUE_ENCODINGS, Bits
from sparsedelta.compare import Source
from sparsedelta.delta import TensorSpec
from sparsedelta.dtypes import DType
from sparsedelta.parallel import Pace
from sparsedelta.stages import Stage


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
    """

    def __init__(
        self,
        name: str,
        spec: TensorSpec,
        base: Source | None,
        stages: Sequence[Stage],
        keep: int,
        pace: Pace,
    ) -> None:
        super().__init__(name, spec)
        self._base = base
        self._stages = stages
        self._keep = keep
        self._pace = pace

    def make(self, number: int) -> Bits:
        """Return the bits of a chunk."""
        dtype = self.dtype
        bits = read_chunk(self._base, dtype, self.n_elements, self._keep, number)
        for stage in self._stages:
            if stage.chunk(number):
                positions, codes = stage.decode(number, self._pace)
                decode = VALUE_ENCODINGS[stage.change.values].decode
                bits[positions] = decode(dtype, bits[positions], codes)
        return bits


def read_chunk(base: Source | None, dtype: DType, n_elements: int, keep: int, number: int) -> Bits:
    """Return the bits of a chunk as they are before a change (FORMAT §4)."""
    start = number * CHUNK_ELEMENTS
    bits = np.zeros(chunk_span(n_elements, number), dtype.view)
    n_kept = min(len(bits), max(0, keep - start))
    if base is not None and n_kept:
        base.read_into(bits[:n_kept].view(np.uint8).data, start * dtype.width)
    return bits

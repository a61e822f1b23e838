"""The bits of a chunk's elements before the change, read as they are asked for (FORMAT §4)."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from sparsedelta.codecs.chunk import CHUNK_ELEMENTS
from sparsedelta.codecs.context import Bits
from sparsedelta.dtypes import DType


class Readable(Protocol):
    """A tensor whose bytes can be read."""

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` with the tensor's bytes from ``offset``."""


class ChunkBase:
    """Reads a chunk's elements before the change: the first ``keep`` are the base's, the others zero.

    The array returned is used again by the next call.
    """

    def __init__(self, tensor: Readable | None, dtype: DType, keep: int, number: int) -> None:
        """Prepare.

        Args:
            tensor: the base's; None if ``keep`` is 0.
            dtype: of the target.
            keep: leading elements taken from the base.
            number: the chunk.
        """
        self._tensor = tensor
        self._dtype = dtype
        self._keep = keep
        self._first = number * CHUNK_ELEMENTS
        self._buffer = np.empty(0, dtype.view)

    def __call__(self, start: int, n: int) -> Bits:
        """Return elements ``start`` … ``start + n`` of the chunk."""
        if len(self._buffer) < n:
            self._buffer = np.empty(n, self._dtype.view)
        bits = self._buffer[:n]
        start += self._first
        kept = max(0, min(n, self._keep - start))
        bits[kept:] = 0
        if kept and self._tensor is not None:
            self._tensor.read_into(bits[:kept].view(np.uint8).data, start * self._dtype.width)
        return bits

"""The start of a row: the elements of the target before the changes are applied (FORMAT §4)."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from sparsedelta.codecs.context import Bits
from sparsedelta.dtypes import DType


class Readable(Protocol):
    """A tensor whose bytes can be read."""

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` with the tensor's bytes from ``offset``."""


def read_start(base: Readable | None, keep: int, first: int, bits: Bits) -> None:
    """Fill ``bits`` with the start of a row from element ``first``.

    The elements below ``keep`` are those of the base; all others are zero bits.
    """
    n_kept = max(0, min(len(bits), keep - first)) if base is not None else 0
    if n_kept < len(bits):
        bits[n_kept:] = 0
        bits = bits[:n_kept]
    if n_kept and base is not None:
        base.read_into(bits.view(np.uint8).data, first * bits.itemsize)


class RowStart:
    """Reads the start of a row for encoders and decoders (``sparsedelta.codecs.context.StartBits``).

    Args:
        base: the base tensor; may be None only if ``keep`` is 0.
        dtype: dtype of the target.
        keep: how many leading elements are taken from the base.
        first: the element from which positions are counted.
    """

    def __init__(self, base: Readable | None, dtype: DType, keep: int, first: int) -> None:
        self._base = base
        self._dtype = dtype
        self._keep = keep
        self._first = first
        self._buffer: Bits | None = None

    def __call__(self, start: int, n: int) -> Bits:
        """Return ``n`` elements from ``start``, counted from ``first``.

        The next call reuses the memory of the returned array.
        """
        if self._buffer is None or len(self._buffer) < n:
            self._buffer = np.empty(n, self._dtype.view)
        bits = self._buffer[:n]
        read_start(self._base, self._keep, self._first + start, bits)
        return bits

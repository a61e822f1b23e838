"""The start of a row: its elements before a change, read as they are asked for (FORMAT §4)."""

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
    """Fill ``bits`` with the start of a row from element ``first``: base elements below ``keep``, then zeros."""
    n_kept = max(0, min(len(bits), keep - first))
    bits[n_kept:] = 0
    if n_kept and base is not None:
        base.read_into(bits[:n_kept].view(np.uint8).data, first * bits.itemsize)


class RowStart:
    """The start of a row from one element on, as encoders and decoders ask for it.

    Args:
        base: the base tensor; None if ``keep`` is 0.
        dtype: of the target.
        keep: leading elements taken from the base.
        first: the element that counts as number 0.

    The array returned is used again by the next call.
    """

    def __init__(self, base: Readable | None, dtype: DType, keep: int, first: int) -> None:
        self._base = base
        self._dtype = dtype
        self._keep = keep
        self._first = first
        self._buffer = np.empty(0, dtype.view)

    def __call__(self, start: int, n: int) -> Bits:
        """Return elements ``start`` … ``start + n``."""
        if len(self._buffer) < n:
            self._buffer = np.empty(n, self._dtype.view)
        bits = self._buffer[:n]
        read_start(self._base, self._keep, self._first + start, bits)
        return bits

"""Code a subset of the numbers below n by the gaps between the chosen numbers, or the others if fewer (FORMAT §6.5)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sparsedelta.codecs import kernels
from sparsedelta.codecs.bitpack import (
    MAX_LOW_BITS,
    Numbers,
    best_low_bits,
    read_number,
    write_number,
)
from sparsedelta.errors import Corrupt


def encode_subset(chosen: Numbers, n: int) -> tuple[bytes, tuple[Numbers, int]]:
    """Return the head of a subset, and its gaps with their Rice parameter.

    Args:
        chosen: ascending, below ``n``.
        n: the numbers are chosen from 0 … n − 1.
    """
    rest = 2 * len(chosen) > n
    gaps = _gaps(others(chosen, n) if rest else chosen)
    k = best_low_bits(gaps)
    return write_number(2 * len(gaps) + rest) + (write_number(k) if len(gaps) else b""), (gaps, k)


@dataclass(frozen=True, slots=True)
class SubsetHead:
    """The head of a subset.

    Attributes:
        n_gaps: number of gaps.
        k: their Rice parameter.
        of_rest: the gaps are between the numbers that are not chosen.
    """

    n_gaps: int
    k: int
    of_rest: bool

    @property
    def length(self) -> tuple[int, int]:
        """Number of gaps and their Rice parameter."""
        return self.n_gaps, self.k

    def listed(self, gaps: Numbers, n: int) -> Numbers:
        """Return the numbers below ``n`` that have these gaps: the chosen ones, or the others if ``of_rest``."""
        return _numbers(gaps, n)

    def chosen(self, gaps: Numbers, n: int) -> Numbers:
        """Return the chosen numbers, ascending.

        Raises:
            Corrupt: the gaps lead to ``n`` or beyond.
        """
        numbers = _numbers(gaps, n)
        return others(numbers, n) if self.of_rest else numbers


def read_subset(stream: bytes, at: int) -> tuple[SubsetHead, int]:
    """Return the head of a subset at ``at``, and the offset after it.

    Raises:
        Corrupt: there is no valid head.
    """
    doubled, at = read_number(stream, at)
    k, at = read_number(stream, at) if doubled > 1 else (0, at)
    if k > MAX_LOW_BITS:
        raise Corrupt(f"stream has parameter {k}, at most {MAX_LOW_BITS} is allowed")
    return SubsetHead(doubled >> 1, k, bool(doubled & 1)), at


def _gaps(ascending: Numbers) -> Numbers:
    """Return the gap before each of strictly ascending numbers: how many numbers are skipped."""
    if kernels.native:
        gaps = np.empty(len(ascending), np.uint32)
        kernels.native.gaps_between(ascending, gaps)
        return gaps
    gaps = np.diff(ascending, prepend=np.uint32(0))
    gaps[1:] -= 1
    return gaps


def _numbers(gaps: Numbers, n: int) -> Numbers:
    """Return the ascending numbers below ``n`` that have these gaps."""
    if kernels.native:
        listed = np.empty(len(gaps), np.uint32)
        kernels.native.numbers_from(gaps, n, listed)
        return listed
    numbers = np.cumsum(gaps, dtype=np.uint64)
    numbers += np.arange(len(gaps), dtype=np.uint32)
    if len(numbers) and int(numbers[-1]) >= n:
        raise Corrupt(f"stream chooses number {numbers[-1]} of {n}")
    return numbers.astype(np.uint32)


def others(ascending: Numbers, n: int) -> Numbers:
    """Return the numbers below ``n`` that are not among ``ascending``."""
    if kernels.native:
        rest = np.empty(n - len(ascending), np.uint32)
        kernels.native.others(ascending, rest)
        return rest
    left = np.ones(n, np.bool_)
    left[ascending] = False
    return np.flatnonzero(left).astype(np.uint32)

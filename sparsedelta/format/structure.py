"""Checks of the values in a manifest's structure (FORMAT §3.1), and its digests in order (FORMAT §9)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from sparsedelta.errors import Corrupt, LimitExceeded
from sparsedelta.format.columns import Column
from sparsedelta.format.strict_json import items

MAX_INTEGER_BITS = 1 << 63  # every integer is smaller


def objects(value: Any, what: str, names: Sequence[str]) -> list[Any]:
    """Return the values of an object that has exactly these members, in this order; else raise Corrupt."""
    if type(value) is not dict or [*value] != [*names]:
        raise Corrupt(f"{what}: expected an object of {', '.join(names)}, in this order")
    return [*value.values()]


def strings(value: Any, what: str, limit: int | None = None) -> None:
    """Raise an error if a value is not a list of at most ``limit`` strings."""
    if not set(map(type, items(value, what, limit))) <= {str}:
        raise Corrupt(f"{what}: expected strings")


def integers(values: list[Any], what: str, *, least: int = 0) -> None:
    """Raise Corrupt if a list holds anything but integers from ``least`` to 2^63 − 1."""
    if not set(map(type, values)) <= {int}:
        raise Corrupt(f"{what}: expected integers")
    if values and not (least <= min(values) and max(values) < MAX_INTEGER_BITS):
        raise Corrupt(f"{what}: an integer is out of range")


def column(
    value: Any, what: str, n: int | None, *, least: int = 0, below: int | None = None
) -> Column:
    """Return a list of integers as an array.

    Args:
        value: the list.
        what: its name, for messages.
        n: how many integers it must have; None: any number.
        least: the smallest that is allowed.
        below: the largest that is allowed is smaller than this; None: 2^63.

    Raises:
        Corrupt: it is not such a list.
    """
    integers(items(value, what), what, least=least)
    if n is not None and len(value) != n:
        raise Corrupt(f"{what}: {len(value)} entries, expected {n}")
    result = np.array(value, np.int64)
    if below is not None and len(result) and int(result.max()) >= below:
        raise Corrupt(f"{what}: found {result.max()}, expected less than {below}")
    return result


def at_most(found: int, limit: int, what: str) -> None:
    """Raise LimitExceeded if a number is above its limit."""
    if found > limit:
        raise LimitExceeded(f"{found} {what}, the limit is {limit}")


class DigestReader:
    """Reads the digests at the end of a manifest, in order.

    Attributes:
        raw: all of them.
    """

    def __init__(self, raw: bytes) -> None:
        self.raw = raw
        self._at = 0

    def take(self, n_bytes: int) -> bytes:
        """Return the next digest."""
        at = int(self.places(1, n_bytes)[0])
        return self.raw[at : at + n_bytes]

    def places(self, n: int, n_bytes: int) -> Column:
        """Return where each of the next ``n`` digests is, (n,)."""
        start = self._at
        self._at += n * n_bytes
        if self._at > len(self.raw):
            raise Corrupt(
                f"the manifest ends within its digests: it has only {len(self.raw)} bytes of them"
            )
        return start + n_bytes * np.arange(n)

    def finish(self) -> None:
        """Check that all digests were taken; raises Corrupt if bytes are left."""
        if self._at != len(self.raw):
            raise Corrupt(f"{len(self.raw) - self._at} bytes follow the last digest")

"""Where the data of a tensor lies in a file of another format."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from sparsedelta.dtypes import DTYPES
from sparsedelta.format.records import TensorSpec

MAX_NAME_BYTES = 900
_MAX_DIMENSIONS = 16


@dataclass(frozen=True, slots=True)
class Region:
    """The data of a tensor, as it lies in a file.

    Attributes:
        name: a name that is unique in the file.
        spec: dtype and shape; one dimension of bytes if they are not known.
        offset: position of its first byte in the file.
    """

    name: str
    spec: TensorSpec
    offset: int

    @property
    def end(self) -> int:
        """Position after its last byte."""
        return self.offset + self.spec.n_bytes


def spec_or_bytes(dtype: str | None, shape: tuple[int, ...], n_bytes: int) -> TensorSpec:
    """Return the layout of a tensor of ``n_bytes`` bytes; one dimension of bytes if dtype and shape do not fit."""
    known = DTYPES.get(dtype or "")
    if (
        known is not None
        and len(shape) <= _MAX_DIMENSIONS
        and math.prod(shape) * known.width == n_bytes
    ):
        return TensorSpec(known, shape)
    return TensorSpec(DTYPES["U8"], (n_bytes,))


def with_unique_names(found: Iterable[Region]) -> list[Region]:
    """Return regions with a number added to names that occur again, or that no delta can hold."""
    used: set[str] = set()
    counts: Counter[str] = Counter()
    result = []
    for one in found:
        name = stem = one.name if _is_short(one.name) else "tensor"
        while name in used:
            counts[stem] += 1
            name = f"{stem}#{counts[stem] + 1}"
        used.add(name)
        result.append(Region(name, one.spec, one.offset))
    return result


def _is_short(name: str) -> bool:
    try:
        return len(name.encode("utf-8")) <= MAX_NAME_BYTES
    except UnicodeEncodeError:
        return False

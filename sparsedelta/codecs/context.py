"""The array types that codecs exchange, and the information about a chunk that codecs may use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Positions: TypeAlias = npt.NDArray[np.uint32]  # (nnz,), strictly increasing, below the span
Stream: TypeAlias = npt.NDArray[np.uint8]  # (n_bytes,)
Bits: TypeAlias = npt.NDArray[Any]  # (n,) unsigned, one for each element

Sizes: TypeAlias = (
    Any  # a number, or an array of numbers for many chunks; whether a check is met for each
)

# Returns the bits of elements start … start + n of a span before the change; zero where the base has none.
# The caller must not write to the array, and must not use it after the next call.
StartBits: TypeAlias = Callable[[int, int], Bits]


@dataclass(frozen=True, slots=True)
class ChunkContext:
    """Information about a chunk, besides its positions, that a codec may use.

    Attributes:
        before: reads the bits of the chunk's elements before the change; None: not available.
        columns: elements in a row of the tensor, for encoders; 0: not known.
        first: column of the chunk's first element, for encoders.
        keys: keys of the elements at the positions (FORMAT §6.2), for encoders; None: not known.
        classes: use classes of elements.
        thresholds: the lowest keys of all classes but the first, for encoders; None: the encoder chooses them.
    """

    before: StartBits | None = None
    columns: int = 0
    first: int = 0
    keys: npt.NDArray[np.uint8] | None = None
    classes: bool = False
    thresholds: Sequence[int] | None = None

    def sorted(self, classes: bool, thresholds: Sequence[int] | None = None) -> ChunkContext:
        """Return the same context, with classes or without."""
        if classes == self.classes and thresholds == self.thresholds:
            return self
        return ChunkContext(self.before, self.columns, self.first, self.keys, classes, thresholds)


NO_CONTEXT = ChunkContext()

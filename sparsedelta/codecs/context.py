"""What is known of a chunk besides its positions, and the shapes of what passes between codecs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Positions: TypeAlias = npt.NDArray[np.uint32]  # (nnz,), strictly increasing, below the span
Stream: TypeAlias = npt.NDArray[np.uint8]  # (n_bytes,)
Bits: TypeAlias = npt.NDArray[Any]  # (n,) unsigned, one an element

# Returns the bits of elements start … start + n of a span before the change, zero where the base has
# none. The array is only read, and until the next call.
StartBits: TypeAlias = Callable[[int, int], Bits]


@dataclass(frozen=True, slots=True)
class ChunkContext:
    """What is known of a chunk besides its positions.

    Attributes:
        before: the bits of its elements before the change; None where they are not available.
        columns: elements in a row of the tensor, for encoders; 0: unknown.
        first: the chunk's first element, as its place in its row; for encoders.
        keys: of the elements at the positions, for encoders (FORMAT §6.2); None: not looked up.
        classes: sort positions and codes into classes.
        keys_found: receives the keys of the positions, if a decoder comes across them.
    """

    before: StartBits | None = None
    columns: int = 0
    first: int = 0
    keys: npt.NDArray[np.uint8] | None = None
    classes: bool = False
    keys_found: list[npt.NDArray[np.uint8]] = field(default_factory=list)

    def sorted(self, classes: bool) -> ChunkContext:
        """Return the same with classes, or without."""
        if classes == self.classes:
            return self
        return ChunkContext(self.before, self.columns, self.first, self.keys, classes)


NO_CONTEXT = ChunkContext()

"""Both decoders behind one face: each applies a delta, reads all of one, or refuses it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import reference_decoder

import sparsedelta
from sparsedelta.errors import SparseDeltaError


@dataclass(frozen=True)
class Decoder:
    """A decoder: how it applies, how it reads everything without a base, what it raises."""

    name: str
    apply: Callable[[Path, Path, Path], object]
    read: Callable[[Path], object]
    error: type[SparseDeltaError] | type[reference_decoder.Refused]

    def code_of(self, action: Callable[[], object]) -> str:
        """Return the code that an action raises, or `accepted`."""
        try:
            action()
        except self.error as error:
            return error.code
        return "accepted"

    def read_code(self, path: Path) -> str:
        """Return the code that reading a delta raises, or `accepted`."""
        return self.code_of(lambda: self.read(path))

    def apply_code(self, base: Path, delta: Path, out: Path) -> str:
        """Return the code that applying a delta raises, or `accepted`."""
        return self.code_of(lambda: self.apply(base, delta, out))


PACKAGE = Decoder(
    "package",
    lambda base, delta, out: sparsedelta.apply(base, delta, out),
    lambda path: sparsedelta.verify(path),
    SparseDeltaError,
)
REFERENCE = Decoder(
    "reference", reference_decoder.apply, reference_decoder.decode, reference_decoder.Refused
)
DECODERS = (REFERENCE, PACKAGE)

"""The methods of a value packing: codes to streams of bytes and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from sparsedelta.codecs.context import Bits, Sizes, Stream
from sparsedelta.codecs.exponent_classes import Keys


class ValuePacking(Protocol):
    """How codes are stored as bytes."""

    is_quick: bool = False  # encoding and decoding are fast
    has_classes: bool = False  # can use classes of the elements before the change
    states_size: bool = True  # the manifest states the raw size of the last stream

    def stream_sizes(self, n_bytes: Sizes, nnz: Sizes, width: int) -> Sequence[Sizes]:
        """Return the raw sizes of the streams of ``nnz`` codes of ``width`` bytes.

        Args:
            nnz: number of codes.
            width: bytes of a code.
            n_bytes: the raw size of the last stream, if the manifest states it; else 0.
        """

    def encode(
        self, codes: Bits, keys: Keys | None, thresholds: Sequence[int] | None = None
    ) -> Sequence[Stream] | None:
        """Return the streams of ``codes``; an empty stream means zeros.

        ``keys`` are the keys of the elements before the change (FORMAT §6.2); None: do not use classes.
        ``thresholds`` are the lowest keys of all classes but the first; None: the encoder chooses them.
        Returns None if another packing is smaller, or if this one cannot store these codes.
        """

    def possible(self, n_bytes: Sizes, nnz: Sizes, width: int) -> Sizes:
        """Return whether the manifest can state ``n_bytes`` for ``nnz`` codes (FORMAT §7)."""

    def decode(self, streams: Sequence[bytes], nnz: int, width: int, keys: Keys | None) -> Bits:
        """Return exactly ``nnz`` codes; ``keys`` None: there are no classes.

        Raises:
            Corrupt: the streams do not hold ``nnz`` codes. With classes, the cause may also be a wrong base.
        """

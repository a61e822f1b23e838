"""What a value packing is: codes to streams of bytes and back, with an encoder's right to decline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from sparsedelta.codecs.context import Bits, Stream
from sparsedelta.codecs.exponent_classes import Keys


class ValuePacking(Protocol):
    """How codes become bytes."""

    is_quick: bool = False  # to encode and decode
    has_classes: bool = False  # may sort codes by what the elements were before the change
    states_size: bool = True  # the manifest states the raw size of the last stream

    def stream_sizes(self, n_bytes: int, nnz: int, width: int) -> Sequence[int]:
        """Return the raw sizes of the streams of ``nnz`` codes of ``width`` bytes.

        Args:
            nnz: number of codes.
            width: bytes of a code.
            n_bytes: what the manifest states of the last stream; 0 if it states nothing.
        """

    def encode(self, codes: Bits, keys: Keys | None) -> Sequence[Stream] | None:
        """Return the streams of ``codes``; an empty one stands for zeros.

        ``keys`` are those of the elements before the change (FORMAT §6.2), None: make no classes.
        None: this cannot be smaller than other packings, or cannot hold these codes.
        """

    def possible(self, n_bytes: int, nnz: int, width: int) -> bool:
        """Return whether the manifest can state ``n_bytes`` for ``nnz`` codes (FORMAT §7)."""

    def decode(self, streams: Sequence[bytes], nnz: int, width: int, keys: Keys | None) -> Bits:
        """Return exactly ``nnz`` codes; ``keys`` None: there are no classes.

        Raises:
            Corrupt: the streams do not hold ``nnz`` codes; with classes, this also says that the base
                is another.
        """

"""What a value packing is: codes to streams of bytes and back, with an encoder's right to decline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from sparsedelta.codecs.context import Bits, Stream
from sparsedelta.codecs.exponent_classes import Keys


class ValuePacking(Protocol):
    """How codes become bytes."""

    is_quick: bool  # to encode and decode
    needs_base: bool  # to decode
    states_size: bool  # the record of the chunk states the size of the last stream

    def stream_sizes(self, n_bytes: int, nnz: int, width: int) -> Sequence[int]:
        """Return the sizes before compression of the streams of ``nnz`` codes of ``width`` bytes.

        Args:
            nnz: number of codes.
            width: bytes of a code.
            n_bytes: what the record of the chunk states of the last stream; 0 if it states nothing.
        """

    def encode(self, codes: Bits, keys: Keys | None) -> Sequence[Stream] | None:
        """Return the streams of ``codes``; an empty one is not stored.

        ``keys`` are those of the base's elements at the positions (FORMAT §6.5), if it is available.
        None: this cannot be smaller than other packings, or cannot hold these codes.
        """

    def possible(self, n_bytes: int, nnz: int, width: int) -> bool:
        """Return whether the record can state ``n_bytes`` for ``nnz`` codes (FORMAT §12)."""

    def decode(self, streams: Sequence[bytes], nnz: int, width: int, keys: Keys | None) -> Bits:
        """Return exactly ``nnz`` codes.

        Raises:
            Corrupt: the streams do not hold ``nnz`` codes; with a packing that needs the base, this
                also says that the base is another.
        """

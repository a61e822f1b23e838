"""What an index encoding is: positions to a stream of bytes and back, with an encoder's right to decline."""

from __future__ import annotations

from typing import Protocol

from sparsedelta.codecs.context import NO_CONTEXT, ChunkContext, Positions, Stream


class IndexEncoding(Protocol):
    """How positions become bytes; what most encodings have in common is written out here."""

    has_classes: bool = False  # may sort positions by what the tensor was before the change

    def is_quick(self, nnz: int, span: int) -> bool:
        """Return whether it is quick to encode and decode at this density."""
        return True

    def worth_trying(self, nnz: int, span: int) -> bool:
        """Return whether this encoding can be the smallest at this density."""

    def encode(
        self, positions: Positions, span: int, context: ChunkContext = NO_CONTEXT
    ) -> Stream | None:
        """Return the stream of ``positions`` in a span of ``span`` elements.

        None: it cannot be smaller than others, as a cheap look shows, or ``context`` lacks what it needs.
        """

    def implied_bytes(self, span: int) -> int | None:
        """Return the raw size of the stream; None: the manifest states it."""
        return None

    def possible(self, n_bytes: int, nnz: int, span: int) -> bool:
        """Return whether a stream of ``n_bytes`` can hold ``nnz`` positions (FORMAT §6)."""

    def decode(
        self, stream: bytes, nnz: int, span: int, context: ChunkContext = NO_CONTEXT
    ) -> Positions:
        """Return exactly ``nnz`` positions.

        Raises:
            Corrupt: the stream does not hold ``nnz`` increasing positions below ``span``; with
                classes, this also says that the base is another.
        """

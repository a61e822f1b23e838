"""The methods of an index encoding: positions to a stream of bytes and back."""

from __future__ import annotations

from typing import Protocol

from sparsedelta.codecs.context import NO_CONTEXT, ChunkContext, Positions, Sizes, Stream
from sparsedelta.codecs.exponent_classes import Choice


class IndexEncoding(Protocol):
    """How positions are stored as bytes. The methods that have a body here are defaults."""

    has_classes: bool = False  # can use classes of the elements before the change

    def is_quick(self, nnz: int, span: int) -> bool:
        """Return whether encoding and decoding are fast at this density."""
        return True

    def worth_trying(self, nnz: int, span: int) -> bool:
        """Return whether this encoding can be the smallest at this density."""

    def encode(
        self, positions: Positions, span: int, context: ChunkContext = NO_CONTEXT
    ) -> Stream | None:
        """Return the stream of ``positions`` in a span of ``span`` elements.

        None: a cheap estimate shows that another encoding is smaller, or ``context`` lacks what this one needs.
        """

    def implied_bytes(self, span: Sizes) -> Sizes | None:
        """Return the raw size of the stream; None: the manifest states it."""
        return None

    def possible(self, n_bytes: Sizes, nnz: Sizes, span: Sizes) -> Sizes:
        """Return whether a stream of ``n_bytes`` can hold ``nnz`` positions (FORMAT §6)."""

    def decode(
        self, stream: bytes, nnz: int, span: int, context: ChunkContext = NO_CONTEXT
    ) -> Positions:
        """Return exactly ``nnz`` positions.

        Raises:
            Corrupt: the stream does not hold ``nnz`` increasing positions below ``span``. With classes, the
                cause may also be a wrong base.
        """

    def open(self, stream: bytes, nnz: int, span: int, *, classes: bool) -> Positions | Choice:
        """Return ``nnz`` positions; or, if they depend on the elements before the change, how to find them.

        Args:
            stream: as for ``decode``.
            nnz: number of positions.
            span: number of elements of the span.
            classes: the stream may use classes.

        Raises:
            Corrupt: see ``decode``.
        """
        return self.decode(stream, nnz, span)

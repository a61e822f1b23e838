"""``all``: every position of the span is touched, and nothing is stored."""

from __future__ import annotations

import numpy as np

from sparsedelta.codecs.context import NO_CONTEXT, ChunkContext, Positions, Stream


class _Everything:
    """Every position; nothing is stored."""

    is_quick = True
    needs_base = False

    def worth_trying(self, nnz: int, span: int) -> bool:
        return nnz == span

    def encode(self, positions: Positions, span: int, context: ChunkContext = NO_CONTEXT) -> Stream:
        return np.empty(0, np.uint8)

    def possible(self, n_bytes: int, nnz: int, span: int) -> bool:
        return n_bytes == 0 and nnz == span

    def decode(
        self, stream: bytes, nnz: int, span: int, context: ChunkContext = NO_CONTEXT
    ) -> Positions:
        return np.arange(span, dtype=np.uint32)


EVERYTHING = _Everything()

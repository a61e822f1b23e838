"""``rice``: gaps between touched positions as Rice codes, for low densities (FORMAT §6.8)."""

from __future__ import annotations

import numpy as np

from sparsedelta.codecs.bitpack import decode_rice, encode_rice
from sparsedelta.codecs.context import NO_CONTEXT, ChunkContext, Positions, Stream
from sparsedelta.codecs.subsets import encode_subset, read_subset
from sparsedelta.errors import Corrupt


class _Rice:
    """Touched positions as a subset of the span."""

    is_quick = False
    needs_base = False

    def worth_trying(self, nnz: int, span: int) -> bool:
        return nnz * 8 <= span

    def encode(
        self, positions: Positions, span: int, context: ChunkContext = NO_CONTEXT
    ) -> Stream | None:
        head, sequence = encode_subset(positions, span)
        return np.frombuffer(head + encode_rice([sequence]), np.uint8)

    def possible(self, n_bytes: int, nnz: int, span: int) -> bool:
        return 1 <= n_bytes <= span // 4 + (1 << 15)

    def decode(
        self, stream: bytes, nnz: int, span: int, context: ChunkContext = NO_CONTEXT
    ) -> Positions:
        head, at = read_subset(stream, 0)
        (gaps,) = decode_rice(stream[at:], [head.length])
        positions = head.chosen(gaps, span)
        if len(positions) != nnz:
            raise Corrupt(f"index stream holds {len(positions)} positions, expected {nnz}")
        return positions


RICE = _Rice()

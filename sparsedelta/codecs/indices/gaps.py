"""``gaps``: the distance from each position to the next as tokens of one byte (FORMAT §6.3)."""

from __future__ import annotations

import numpy as np

from sparsedelta.codecs import kernels
from sparsedelta.codecs.context import NO_CONTEXT, ChunkContext, Positions, Sizes, Stream
from sparsedelta.codecs.indices.contract import IndexEncoding
from sparsedelta.errors import Corrupt

_SKIP = 255  # advances without touching


class _Gaps(IndexEncoding):
    """Tokens of one byte. The highest token advances without touching an element."""

    def worth_trying(self, nnz: int, span: int) -> bool:
        return nnz * 2000 >= span  # in sparser chunks, most tokens would be skips

    def encode(self, positions: Positions, span: int, context: ChunkContext = NO_CONTEXT) -> Stream:
        if kernels.native:
            tokens = np.empty(len(positions) + int(positions[-1]) // _SKIP, np.uint8)
            return tokens[: kernels.native.put_gaps(positions, tokens)]
        gaps = np.empty(len(positions), np.uint32)
        gaps[0] = positions[0]
        np.subtract(positions[1:], positions[:-1], out=gaps[1:])
        gaps[1:] -= 1
        n_skips = gaps // _SKIP
        if not n_skips.any():
            return gaps.astype(np.uint8)
        last = np.cumsum(n_skips + 1, dtype=np.int64) - 1  # the place of each gap's last token
        tokens = np.full(int(last[-1]) + 1, _SKIP, np.uint8)
        tokens[last] = gaps - n_skips * np.uint32(_SKIP)
        return tokens

    def possible(self, n_bytes: Sizes, nnz: Sizes, span: Sizes) -> Sizes:
        return (nnz <= n_bytes) & (n_bytes <= nnz + span // _SKIP)

    def decode(
        self, stream: bytes, nnz: int, span: int, context: ChunkContext = NO_CONTEXT
    ) -> Positions:
        if kernels.native:
            positions: Positions = np.empty(nnz, np.uint32)
            kernels.native.read_gaps(stream, span, positions)
            return positions
        tokens = np.frombuffer(stream, np.uint8)
        touching = tokens != _SKIP
        if int(np.count_nonzero(touching)) != nnz or not touching[-1]:
            raise Corrupt(f"index stream does not hold exactly {nnz} positions")
        # A skip advances by 255, a touching token t by t + 1; positions count from -1.
        advance = tokens.astype(np.uint32)
        advance += touching
        if int(advance.sum(dtype=np.uint64)) > span:
            raise Corrupt(f"index stream leaves its span of {span} elements")
        np.cumsum(advance, out=advance)
        positions = advance if nnz == len(tokens) else advance[touching]
        positions -= 1
        return positions


GAPS = _Gaps()

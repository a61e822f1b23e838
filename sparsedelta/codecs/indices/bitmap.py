"""``bitmap``: one bit for each element (FORMAT §6.4)."""

from __future__ import annotations

import numpy as np

from sparsedelta.codecs import kernels
from sparsedelta.codecs.context import NO_CONTEXT, ChunkContext, Positions, Sizes, Stream
from sparsedelta.codecs.indices.contract import IndexEncoding
from sparsedelta.errors import Corrupt

_BLOCK_POSITIONS = 1 << 20


class _Bitmap(IndexEncoding):
    """One bit for each element, the least significant first."""

    def worth_trying(self, nnz: int, span: int) -> bool:
        return nnz * 16 >= span

    def encode(self, positions: Positions, span: int, context: ChunkContext = NO_CONTEXT) -> Stream:
        if kernels.native:
            bits = np.zeros(-(-span // 8), np.uint8)
            kernels.native.put_bits(positions, bits)
            return bits
        touched = np.zeros(span, np.bool_)
        touched[positions] = True
        return np.packbits(touched, bitorder="little")

    def implied_bytes(self, span: Sizes) -> Sizes:
        return -(-span // 8)

    def possible(self, n_bytes: Sizes, nnz: Sizes, span: Sizes) -> Sizes:
        return n_bytes == self.implied_bytes(span)

    def decode(
        self, stream: bytes, nnz: int, span: int, context: ChunkContext = NO_CONTEXT
    ) -> Positions:
        if kernels.native:
            return _ones(stream, nnz, span)
        touched = np.unpackbits(np.frombuffer(stream, np.uint8), bitorder="little")
        if touched[span:].any():
            raise Corrupt(f"bitmap touches positions outside its span of {span} elements")
        found = int(np.count_nonzero(touched))
        if found != nnz:
            raise Corrupt(f"bitmap holds {found} positions, expected {nnz}")
        positions, end = np.empty(nnz, np.uint32), 0
        for start in range(
            0, span, _BLOCK_POSITIONS
        ):  # flatnonzero needs 8 bytes for each position
            here = np.flatnonzero(touched[start : start + _BLOCK_POSITIONS])
            np.add(here, start, out=positions[end : end + len(here)], casting="unsafe")
            end += len(here)
        return positions


def _ones(stream: bytes, nnz: int, span: int) -> Positions:
    positions = np.empty(nnz, np.uint32)
    found = kernels.native.ones(stream, positions) if kernels.native else 0
    if span % 8 and stream[-1] >> span % 8:
        raise Corrupt(f"bitmap touches positions outside its span of {span} elements")
    if found != nnz:
        raise Corrupt(f"bitmap holds {found} positions, expected {nnz}")
    return positions


BITMAP = _Bitmap()

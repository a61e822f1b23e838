"""``gap8`` and ``gap16``: the distance from each position to the next as tokens of one or two bytes."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from sparsedelta.codecs.context import NO_CONTEXT, ChunkContext, Positions, Stream
from sparsedelta.errors import Corrupt


class _Gaps:
    """Tokens of ``width`` bytes; the highest advances without touching."""

    is_quick = True
    needs_base = False

    def __init__(self, width: int) -> None:
        self.width = width
        self.skip = (1 << 8 * width) - 1

    def worth_trying(self, nnz: int, span: int) -> bool:
        # Eight-bit tokens drown in skips when sparse; sixteen-bit ones never win when dense.
        return nnz * 2000 >= span if self.width == 1 else nnz * 100 <= span

    def encode(self, positions: Positions, span: int, context: ChunkContext = NO_CONTEXT) -> Stream:
        gaps = np.empty(len(positions), np.uint32)
        gaps[0] = positions[0]
        np.subtract(positions[1:], positions[:-1], out=gaps[1:])
        gaps[1:] -= 1
        n_skips = gaps // self.skip
        if not n_skips.any():
            return self._planes(gaps.astype(f"<u{self.width}"))
        last = np.cumsum(n_skips + 1, dtype=np.int64) - 1  # where each gap's final token stands
        tokens = np.full(int(last[-1]) + 1, self.skip, dtype=f"<u{self.width}")
        tokens[last] = gaps - n_skips * np.uint32(self.skip)
        return self._planes(tokens)

    def possible(self, n_bytes: int, nnz: int, span: int) -> bool:
        n_tokens, rest = divmod(n_bytes, self.width)
        return not rest and nnz <= n_tokens <= nnz + span // self.skip

    def decode(
        self, stream: bytes, nnz: int, span: int, context: ChunkContext = NO_CONTEXT
    ) -> Positions:
        tokens = self._tokens(stream)
        touching = tokens != self.skip
        if int(np.count_nonzero(touching)) != nnz or not touching[-1]:
            raise Corrupt(f"index stream does not hold exactly {nnz} positions")
        # A skip advances by `skip`, a touching token t by t + 1; positions count from -1.
        advance = tokens.astype(np.uint32)
        advance += touching
        if int(advance.sum(dtype=np.uint64)) > span:
            raise Corrupt(f"index stream leaves its span of {span} elements")
        np.cumsum(advance, out=advance)
        positions: Positions = advance if nnz == len(tokens) else advance[touching]
        positions -= 1
        return positions

    def _planes(self, tokens: npt.NDArray[np.unsignedinteger]) -> npt.NDArray[np.uint8]:
        columns = tokens.view(np.uint8).reshape(len(tokens), self.width)
        return np.ascontiguousarray(columns.T).ravel()

    def _tokens(self, stream: bytes) -> npt.NDArray[np.unsignedinteger]:
        planes = np.frombuffer(stream, np.uint8).reshape(self.width, -1)
        return np.ascontiguousarray(planes.T).view(f"<u{self.width}").ravel()


GAP8, GAP16 = _Gaps(1), _Gaps(2)

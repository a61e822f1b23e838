"""Index encodings (FORMAT §6): streams of bytes for strictly increasing positions within one chunk.

A registry: an encoding is one object with the four methods of ``IndexEncoding``. The encoder keeps
the one whose compressed stream is smallest; the decoder obeys the name in the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Protocol

import numpy as np
import numpy.typing as npt

from sparsedelta.errors import Corrupt

_BLOCK_POSITIONS = 1 << 20

Positions = npt.NDArray[np.uint32]  # (nnz,), strictly increasing, below the span


class IndexEncoding(Protocol):
    """How positions become bytes."""

    def worth_trying(self, nnz: int, span: int) -> bool:
        """Return whether this encoding can be the smallest at this density."""

    def encode(self, positions: Positions, span: int) -> npt.NDArray[np.uint8]:
        """Return the stream of ``positions`` in a span of ``span`` elements."""

    def possible(self, n_bytes: int, nnz: int, span: int) -> bool:
        """Return whether a stream of ``n_bytes`` can hold ``nnz`` positions (FORMAT §12)."""

    def decode(self, stream: bytes, nnz: int, span: int) -> Positions:
        """Return exactly ``nnz`` positions.

        Raises:
            Corrupt: the stream does not hold ``nnz`` increasing positions below ``span``.
        """


class _Gap:
    """Gaps as tokens of ``width`` bytes; the highest token advances without touching."""

    def __init__(self, width: int) -> None:
        self.width = width
        self.skip = (1 << 8 * width) - 1

    def worth_trying(self, nnz: int, span: int) -> bool:
        # Eight-bit tokens drown in skips when sparse; sixteen-bit ones never win when dense.
        return nnz * 2000 >= span if self.width == 1 else nnz * 100 <= span

    def encode(self, positions: Positions, span: int) -> npt.NDArray[np.uint8]:
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

    def decode(self, stream: bytes, nnz: int, span: int) -> Positions:
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


class _Bitmap:
    """One bit a position, the least significant first."""

    def worth_trying(self, nnz: int, span: int) -> bool:
        return nnz * 16 >= span

    def encode(self, positions: Positions, span: int) -> npt.NDArray[np.uint8]:
        touched = np.zeros(span, np.bool_)
        touched[positions] = True
        return np.packbits(touched, bitorder="little")

    def possible(self, n_bytes: int, nnz: int, span: int) -> bool:
        return n_bytes == -(-span // 8)

    def decode(self, stream: bytes, nnz: int, span: int) -> Positions:
        touched = np.unpackbits(np.frombuffer(stream, np.uint8), bitorder="little")
        if touched[span:].any():
            raise Corrupt(f"bitmap touches positions outside its span of {span} elements")
        found = int(np.count_nonzero(touched))
        if found != nnz:
            raise Corrupt(f"bitmap holds {found} positions, expected {nnz}")
        positions, end = np.empty(nnz, np.uint32), 0
        for start in range(0, span, _BLOCK_POSITIONS):  # flatnonzero takes 8 bytes a position
            here = np.flatnonzero(touched[start : start + _BLOCK_POSITIONS])
            np.add(here, start, out=positions[end : end + len(here)], casting="unsafe")
            end += len(here)
        return positions


class _All:
    """Every position; nothing is stored."""

    def worth_trying(self, nnz: int, span: int) -> bool:
        return nnz == span

    def encode(self, positions: Positions, span: int) -> npt.NDArray[np.uint8]:
        return np.empty(0, np.uint8)

    def possible(self, n_bytes: int, nnz: int, span: int) -> bool:
        return n_bytes == 0 and nnz == span

    def decode(self, stream: bytes, nnz: int, span: int) -> Positions:
        return np.arange(span, dtype=np.uint32)


# In order of trial: of equally small candidates the first is kept.
INDEX_ENCODINGS: Mapping[str, IndexEncoding] = MappingProxyType(
    {"all": _All(), "gap8": _Gap(1), "gap16": _Gap(2), "bitmap": _Bitmap()}
)

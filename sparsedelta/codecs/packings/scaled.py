"""``scaled``: a symbol for the magnitude of each code, and the lower bits packed (FORMAT §7.4)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from sparsedelta.codecs.bitpack import blocks, pack, unpack
from sparsedelta.codecs.context import Bits, Sizes, Stream
from sparsedelta.codecs.exponent_classes import Keys
from sparsedelta.codecs.packings.contract import ValuePacking
from sparsedelta.errors import Corrupt

_SHORT = 2  # codes up to this mean one unit; if most codes are, other packings are smaller
_MAX_SYMBOL = 63  # the symbol of the highest code below 2^32

Symbols = npt.NDArray[np.uint8]


class _Scaled(ValuePacking):
    """Stores a symbol for each code, and the bits that the symbol does not determine."""

    def stream_sizes(self, n_bytes: Sizes, nnz: Sizes, width: int) -> Sequence[Sizes]:
        return [nnz, n_bytes]

    def encode(
        self, codes: Bits, keys: Keys | None, thresholds: Sequence[int] | None = None
    ) -> Sequence[Stream] | None:
        if int(codes.max()) >> 32 or 2 * np.count_nonzero(codes <= _SHORT) > len(codes):
            return None
        numbers = codes.astype(np.uint32)
        symbols = _symbols(numbers)
        parts = [pack(numbers[chosen], k) for chosen, k in _by_symbol(symbols)]
        return [symbols, np.concatenate([np.empty(0, np.uint8), *parts])]

    def possible(self, n_bytes: Sizes, nnz: Sizes, width: int) -> Sizes:
        return n_bytes <= min(width, 4) * nnz

    def decode(self, streams: Sequence[bytes], nnz: int, width: int, keys: Keys | None) -> Bits:
        symbols, raw = (np.frombuffer(stream, np.uint8) for stream in streams)
        if int(symbols.max()) > min(_MAX_SYMBOL, 16 * width - 1):
            raise Corrupt(f"value stream holds symbol {symbols.max()}, too high for {width} bytes")
        codes = symbols.astype(np.uint32)  # the symbol of a code below 4 is the code itself
        at = 0
        for chosen, k in _by_symbol(symbols):
            size = -(-len(chosen) * k // 8)
            if at + size > len(raw):
                raise Corrupt("value stream ends within a code")
            leading = (symbols[chosen] & 1).astype(np.uint32) | np.uint32(2)
            codes[chosen] = leading << np.uint32(k) | unpack(raw[at : at + size], len(chosen), k)
            at += size
        if at != len(raw):
            raise Corrupt("value stream has bytes after its codes")
        return codes.astype(f"<u{width}")


def _symbols(codes: npt.NDArray[np.uint32]) -> Symbols:
    """Return twice the number of bits below the two leading ones, plus the two leading bits."""
    symbols = np.empty(len(codes), np.uint8)
    for block in blocks(len(codes)):
        exponents = np.frexp(codes[block].astype(np.float64))[1]
        below = np.maximum(exponents - 2, 0).astype(np.uint32)
        symbols[block] = (codes[block] >> below) + 2 * below
    return symbols


def _by_symbol(symbols: Symbols) -> Iterator[tuple[npt.NDArray[np.intp], int]]:
    """Yield k, ascending from 1, with the places of the codes that have k bits below their two leading bits."""
    halved = symbols >> 1  # one more than the number of bits below the two leading bits
    for found in np.flatnonzero(np.bincount(halved)[2:]).tolist():
        yield np.flatnonzero(halved == found + 2), found + 1


SCALED = _Scaled()

"""``planes``: one stream for each byte of a code, the least significant first."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sparsedelta.codecs.context import Bits, Sizes, Stream
from sparsedelta.codecs.exponent_classes import Keys
from sparsedelta.codecs.packings.contract import ValuePacking

_NOTHING = np.empty(0, np.uint8)


class _Planes(ValuePacking):
    """Byte planes. A plane of zeros is not stored."""

    is_quick = True
    states_size = False

    def stream_sizes(self, n_bytes: Sizes, nnz: Sizes, width: int) -> Sequence[Sizes]:
        return [nnz] * width

    def encode(
        self, codes: Bits, keys: Keys | None, thresholds: Sequence[int] | None = None
    ) -> Sequence[Stream]:
        raw = codes.view(np.uint8)
        used = int(np.bitwise_or.reduce(codes)).to_bytes(codes.itemsize, "little")
        return [raw[j :: len(used)].copy() if bits else _NOTHING for j, bits in enumerate(used)]

    def possible(self, n_bytes: Sizes, nnz: Sizes, width: int) -> Sizes:
        return n_bytes == 0

    def decode(self, streams: Sequence[bytes], nnz: int, width: int, keys: Keys | None) -> Bits:
        planes = np.zeros((nnz, width), np.uint8)
        for j, stream in enumerate(streams):
            if stream:
                planes[:, j] = np.frombuffer(stream, np.uint8)
        return planes.view(f"<u{width}").reshape(nnz)


PLANES = _Planes()

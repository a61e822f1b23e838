"""A target tensor that is rebuilt from its base tensor while it is read.

Reading is fastest from the first byte to the last, as ``Comparison`` reads. Each reader holds the
changes of one chunk.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sparsedelta.format.records import Payload, Row, TensorSpec
from sparsedelta.tensors.changes import ChangeReader
from sparsedelta.tensors.parallel import Pace
from sparsedelta.tensors.start import Readable, read_start


class RebuiltTensor:
    """A target tensor, rebuilt on demand (a ``Source``).

    Args:
        row: the row of the tensor.
        base: the base tensor, which may be a ``RebuiltTensor``; None if the row has none.
        payload: holds the chunks of the row.
        pace: receives the number of coded bytes read.
        others: rows of other deltas that change the same base tensor, with their payloads. No two
            rows may touch the same element.
    """

    def __init__(
        self,
        row: Row,
        base: Readable | None,
        payload: Payload,
        pace: Pace,
        *,
        others: Sequence[tuple[Row, Payload]] = (),
    ) -> None:
        self.file = row.file
        self.name = row.name
        self.spec: TensorSpec = row.target
        self._base = base
        self._keep = row.keep
        self._readers = [
            ChangeReader(one, held, pace, base) for one, held in ((row, payload), *others)
        ]

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` with the tensor's bytes from ``offset``.

        Both the size of ``buffer`` and ``offset`` must be multiples of the element's width.
        """
        dtype = self.spec.dtype
        bits = np.frombuffer(buffer, dtype.view)
        start = offset // dtype.width
        read_start(self._base, self._keep, start, bits)
        for reader in self._readers:
            for piece in reader.window(start, len(bits)):
                piece.apply(dtype, bits)

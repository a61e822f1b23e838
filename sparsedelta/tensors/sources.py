"""A tensor of the target as something to read, made from the base's while it is read.

Reading is best done forward, as ``Comparison`` does; the changes of one chunk are held at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sparsedelta.format.records import Payload, Row, TensorSpec
from sparsedelta.tensors.changes import ChangeReader
from sparsedelta.tensors.parallel import Pace
from sparsedelta.tensors.start import Readable, read_start


class MadeTensor:
    """A target tensor (a ``Source``).

    Args:
        row: the tensor.
        base: the base tensor, which may be a made one; None: it has none.
        payload: holds the coded chunks.
        pace: told of every coded byte.
        others: further changes of the same base tensor, with their payloads; none touches what
            another does.
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
        """Fill ``buffer`` with the tensor's bytes from ``offset``; both are whole elements."""
        dtype = self.spec.dtype
        bits = np.frombuffer(buffer, dtype.view)
        start = offset // dtype.width
        read_start(self._base, self._keep, start, bits)
        for reader in self._readers:
            for piece in reader.window(start, len(bits)):
                piece.apply(dtype, bits)

"""Checkpoints of ``torch.distributed.checkpoint`` as deltas on the one before. Importing this package imports torch."""

from __future__ import annotations

from sparsedelta.distributed.links import needed
from sparsedelta.distributed.reader import DeltaStorageReader
from sparsedelta.distributed.writer import DeltaStorageWriter

__all__ = ["DeltaStorageReader", "DeltaStorageWriter", "needed"]

"""Deltas from all ranks: of a model that they divide, and of checkpoints of ``torch.distributed.checkpoint`` on the one before.

Importing this package imports torch.
"""

from __future__ import annotations

from sparsedelta.distributed.diffing import diff_shards
from sparsedelta.distributed.links import needed
from sparsedelta.distributed.reader import DeltaStorageReader
from sparsedelta.distributed.writer import DeltaStorageWriter

__all__ = ["DeltaStorageReader", "DeltaStorageWriter", "diff_shards", "needed"]

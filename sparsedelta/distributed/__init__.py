"""Deltas from all ranks: of a model that they divide, and of checkpoints of ``torch.distributed.checkpoint`` on the one before.

Using a name of this package imports torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparsedelta.distributed.diffing import diff_shards
    from sparsedelta.distributed.links import needed
    from sparsedelta.distributed.reader import DeltaStorageReader
    from sparsedelta.distributed.shard_snapshot import ShardSnapshot
    from sparsedelta.distributed.writer import DeltaStorageWriter
    from sparsedelta.live.wire import RankFailed, RankLost, Wire

__all__ = [
    "DeltaStorageReader",
    "DeltaStorageWriter",
    "RankFailed",
    "RankLost",
    "ShardSnapshot",
    "Wire",
    "diff_shards",
    "needed",
]

_MODULES = {
    "DeltaStorageReader": "distributed.reader",
    "DeltaStorageWriter": "distributed.writer",
    "RankFailed": "live.wire",
    "RankLost": "live.wire",
    "ShardSnapshot": "distributed.shard_snapshot",
    "Wire": "live.wire",
    "diff_shards": "distributed.diffing",
    "needed": "distributed.links",
}


def __getattr__(name: str) -> Any:
    # Imported on first use: Wire does not need torch.distributed.checkpoint.
    if name not in _MODULES:
        raise AttributeError(f"module 'sparsedelta.distributed' has no attribute {name!r}")
    value = getattr(import_module(f"sparsedelta.{_MODULES[name]}"), name)
    globals()[name] = value
    return value

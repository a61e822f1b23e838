"""What a checkpoint that is a delta adds to torch's ``.metadata``, and what the coordinator tells the ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.distributed.checkpoint.metadata import StorageMeta

METADATA = ".metadata"


@dataclass
class DeltaMeta(StorageMeta):
    """The ``storage_meta`` of a checkpoint that is a delta.

    Attributes:
        previous: the folder of the checkpoint before, relative to this one.
        previous_id: the ``save_id`` of that checkpoint.
    """

    previous: str = ""
    previous_id: str | None = None


@dataclass(frozen=True)
class DeltaItem:
    """Where a tensor, or a shard of one, is stored: a row of a delta file.

    Attributes:
        relative_path: the delta file, in the folder of the checkpoint.
        name: the name of the row.
    """

    relative_path: str
    name: str


@dataclass(frozen=True)
class RankPlan:
    """The ``storage_data`` of a rank's plan.

    Attributes:
        inner: that of ``FileSystemWriter``.
        delta_name: name of the rank's delta file.
        folder: the folder that is written.
        save_id: identifies the new checkpoint.
        previous: the folder of the checkpoint before; None to write a full checkpoint.
        previous_id: its ``save_id``.
    """

    inner: Any
    delta_name: str
    folder: str
    save_id: str
    previous: str | None
    previous_id: str | None

"""``DeltaStorageReader``: ``torch.distributed.checkpoint.load`` from full checkpoints and deltas."""

from __future__ import annotations

import os
from collections import defaultdict
from dataclasses import replace

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from sparsedelta.distributed.links import Link
from sparsedelta.distributed.records import DeltaItem


class DeltaStorageReader(FileSystemReader):
    """Reads what ``DeltaStorageWriter`` wrote, and any checkpoint that ``FileSystemReader`` reads.

    The number of ranks and the division of the tensors may be others than when it was saved. Every rebuilt tensor is
    compared with its digest. A rank holds one stored tensor or shard at a time, twice.

    Args:
        path: the folder of the checkpoint.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path)
        self._metadata: Metadata | None = None

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: object, **kwargs: object
    ) -> None:
        """Keep the metadata; see ``StorageReader``."""
        super().set_up_storage_reader(metadata, is_coordinator, *args, **kwargs)
        self._metadata = metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read the items of a plan; see ``StorageReader``.

        Raises:
            CheckpointError: a checkpoint that this one is a delta on is missing, or was replaced.
            FormatError: a delta file is damaged.
        """
        plain: list[ReadItem] = []
        rebuilt: dict[MetadataIndex, list[ReadItem]] = defaultdict(list)
        for item in plan.items:
            index = item.storage_index
            if isinstance(self.storage_data[index], DeltaItem):
                rebuilt[index].append(item)
            else:
                plain.append(item)
        done = super().read_data(replace(plan, items=plain), planner)
        with Link(self.path, self._metadata) as link:
            for index, items in rebuilt.items():
                stored = link.read(index)
                for item in items:
                    _deliver(stored, item, planner)
        return done


def _deliver(stored: torch.Tensor, item: ReadItem, planner: LoadPlanner) -> None:
    """Copy the part of a stored tensor that an item asks for to its place."""
    for dim, (start, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
        stored = stored.narrow(dim, start, length)
    place = planner.resolve_tensor(item).detach()
    if place.size() != stored.size():
        raise ValueError(
            f"tensor {item.storage_index.fqn!r} has the shape {list(place.size())} in the state to load, expected"
            f" {list(stored.size())}"
        )
    place.copy_(stored)
    planner.commit_tensor(item, place)

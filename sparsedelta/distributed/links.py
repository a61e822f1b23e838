"""A checkpoint and those that it is a delta on, back to a full one."""

from __future__ import annotations

import os
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem

from sparsedelta._typing import AnyPath
from sparsedelta.distributed.landing import Landing
from sparsedelta.distributed.records import METADATA, DeltaItem, DeltaMeta
from sparsedelta.errors import CheckpointError, Corrupt
from sparsedelta.format.delta import Delta, load
from sparsedelta.format.records import Row
from sparsedelta.live.bits import TensorBytes, flat_bits
from sparsedelta.live.items import ItemTensor
from sparsedelta.tensors.parallel import Pace
from sparsedelta.tensors.rebuild import BaseDiffers, rebuild


class Link:
    """An open checkpoint, full or a delta; it reads tensors, or shards of them, as they were saved.

    Args:
        folder: the folder of the checkpoint.
        metadata: its metadata; None to read it.
    """

    def __init__(self, folder: AnyPath, metadata: Metadata | None = None) -> None:
        self.folder = Path(folder)
        self._reader = FileSystemReader(self.folder)
        self.metadata = metadata or _metadata(self.folder)
        self._reader.set_up_storage_reader(self.metadata, True)
        self._deltas: dict[str, tuple[Delta, dict[str, Row]]] = {}

    def __enter__(self) -> Link:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the delta files of this link and of those before it."""
        while self._deltas:
            self._deltas.popitem()[1][0].close()
        if "previous" in self.__dict__ and self.previous:
            self.previous.close()

    @property
    def save_id(self) -> str | None:
        """Identifies the checkpoint; None if torch did not record it."""
        return self.metadata.storage_meta.save_id if self.metadata.storage_meta else None

    @cached_property
    def previous(self) -> Link | None:
        """The checkpoint that this one is a delta on; None if this one is full.

        Raises:
            CheckpointError: it is missing, or was replaced by another one.
        """
        meta = self.metadata.storage_meta
        if not isinstance(meta, DeltaMeta):
            return None
        where = Path(os.path.normpath(self.folder / meta.previous))
        if not (where / METADATA).exists():
            raise CheckpointError(
                f"'{self.folder}' holds only the changes since '{where}', which is missing; restore that folder, or"
                " load another checkpoint"
            )
        link = Link(where)
        if link.save_id != meta.previous_id:
            raise CheckpointError(
                f"'{self.folder}' holds only the changes since '{where}', which now holds another checkpoint; restore"
                " the old one, or load another checkpoint"
            )
        return link

    def layout(self, index: MetadataIndex) -> tuple[torch.dtype, torch.Size] | None:
        """Return dtype and shape of a stored tensor or shard; None if there is none."""
        found = self.metadata.state_dict_metadata.get(index.fqn)
        if index not in self.metadata.storage_data or not isinstance(found, TensorStorageMetadata):
            return None
        for chunk in found.chunks:
            if index.offset is None or chunk.offsets == index.offset:
                return found.properties.dtype, chunk.sizes
        return None

    def read(self, index: MetadataIndex) -> torch.Tensor:
        """Return a stored tensor or shard, rebuilt and checked, in host memory.

        Raises:
            CheckpointError: it is not there, or a checkpoint before is missing.
            FormatError: a delta file is damaged.
        """
        layout = self.layout(index)
        if layout is None:
            raise CheckpointError(
                f"'{self.folder}' holds no tensor {index.fqn!r} at {index.offset}"
            )
        stored = self.metadata.storage_data[index]
        result = torch.empty(layout[1], dtype=layout[0])
        if isinstance(stored, DeltaItem):
            self._rebuild(index, stored, result)
        else:
            nothing = torch.Size([0] * result.dim())
            item = ReadItem(
                LoadItemType.TENSOR, index, nothing, index, nothing, torch.Size(result.shape)
            )
            self._reader.read_data(LoadPlan([item]), Landing(result)).wait()
        return result

    def _rebuild(self, index: MetadataIndex, stored: DeltaItem, result: torch.Tensor) -> None:
        if self.previous is None:
            raise CheckpointError(f"'{self.folder}' does not say what it is a delta on")
        delta, rows = self._delta(stored.relative_path)
        row = rows.get(stored.name)
        if row is None or row.target.n_bytes != result.nbytes:
            raise Corrupt(
                f"'{self.folder / stored.relative_path}' does not hold the tensor {stored.name!r} that"
                f" '{METADATA}' names; copy the checkpoint again"
            )
        base = self.previous.read(index)
        memory = flat_bits(result).numpy().view(np.uint8)

        def write(data: memoryview, offset: int) -> None:
            memory[offset : offset + len(data)] = np.frombuffer(data, np.uint8)

        source = ItemTensor("", row.name, row.target, -1, 0, TensorBytes(base))
        try:
            rebuild(row, source, delta.payload, write, check="full", pace=Pace())
        except BaseDiffers as error:
            raise CheckpointError(
                f"tensor {row.name!r} in '{self.previous.folder}' is not the one that '{self.folder}' was saved as a"
                " delta on; that checkpoint is damaged or has changed; restore it, or load another checkpoint",
                tensor=row.name,
            ) from error

    def _delta(self, path: str) -> tuple[Delta, dict[str, Row]]:
        if path not in self._deltas:
            delta = load(self.folder / path, any_size=True)
            self._deltas[path] = delta, {row.name: row for row in delta.tensors}
        return self._deltas[path]


def needed(folder: AnyPath) -> list[Path]:
    """Return the folders that loading a checkpoint needs: itself, and those that it is a delta on, the full one last.

    Raises:
        CheckpointError: one of them is missing, or was replaced by another checkpoint.
    """
    found: list[Path] = []
    link: Link | None = Link(folder)
    while link:
        found.append(link.folder)
        link = link.previous
    return found


def _metadata(folder: Path) -> Metadata:
    if not (folder / METADATA).exists():
        raise CheckpointError(
            f"'{folder}' is not a complete checkpoint of torch.distributed: it has no {METADATA}"
        )
    return FileSystemReader(folder).read_metadata()

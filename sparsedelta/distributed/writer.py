"""``DeltaStorageWriter``: ``torch.distributed.checkpoint.save`` that writes only what changed since the last save."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from sparsedelta._typing import AnyPath
from sparsedelta.distributed.links import Link, needed
from sparsedelta.distributed.records import METADATA, DeltaItem, DeltaMeta, RankPlan
from sparsedelta.errors import CheckpointError
from sparsedelta.live.bits import SAVED_DTYPES, integer_view, wire_name
from sparsedelta.live.items import Items
from sparsedelta.ops.diff import between

Held = dict[MetadataIndex, torch.Tensor]


class DeltaStorageWriter(FileSystemWriter):
    """Saves a checkpoint as a delta on the one that it saved before; all ranks write at the same time.

    Each rank compares the tensors and shards that it writes with a copy in host memory, or with the last checkpoint
    if it has no copy, and writes one delta file. Tensors that are new, or divided otherwise, are written in full. Use one
    writer for all saves, each into a new folder::

        writer = DeltaStorageWriter("checkpoints/0")
        torch.distributed.checkpoint.save(state, storage_writer=writer, checkpoint_id="checkpoints/0")

    The first checkpoint and every ``full_every``-th are full, as ``FileSystemWriter`` writes them. The others need those
    before them, back to a full one (``needed``). A checkpoint is complete once it has its ``.metadata``, which the
    coordinator writes last. After a save that failed, the next one is a delta on the last complete checkpoint.
    """

    def __init__(
        self,
        path: AnyPath,
        *,
        base: AnyPath | None = None,
        full_every: int = 16,
        level: str = "fast",
        keep_copy: bool = True,
        sync_files: bool = True,
        thread_count: int = 1,
    ) -> None:
        """Prepare.

        Args:
            path: the folder to write; ``checkpoint_id`` of ``save`` replaces it.
            base: a checkpoint to begin with, such as the last one of a run that is resumed; its ranks may have been
                others. None: the first checkpoint is full.
            full_every: how many checkpoints one full checkpoint begins; 1 makes all of them full.
            level: ``"fast"``, ``"default"`` or ``"max"``; see ``sparsedelta.diff``.
            keep_copy: keep a copy of what this rank has saved in host memory. If false, it is read from the last
                checkpoint at each save.
            sync_files: see ``FileSystemWriter``.
            thread_count: the same.

        Raises:
            CheckpointError: ``base`` is not a complete checkpoint, or one that it needs is missing.
            ValueError: ``full_every`` is below 1, or ``level`` is unknown.
        """
        super().__init__(path, sync_files=sync_files, thread_count=thread_count, overwrite=False)
        if full_every < 1:
            raise ValueError(f"full_every is {full_every}, expected at least 1")
        if level not in ("fast", "default", "max"):
            raise ValueError(f"level is {level!r}, expected one of fast, default, max")
        self._full_every = full_every
        self._level = level
        self._keeps = keep_copy
        self._chain = needed(base) if base is not None else []  # of the last checkpoint, that first
        self._held: Held = {}
        self._held_id: str | None = None
        self._previous: tuple[Path, str | None] | None = None  # of the checkpoint that is written

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Prepare for a save; see ``StorageWriter``.

        Raises:
            ValueError: the ranks save without a coordinator.
        """
        super().set_up_storage_writer(is_coordinator, *args, **kwargs)
        if not self.use_collectives:
            raise ValueError(
                "DeltaStorageWriter needs a coordinator; save with use_collectives=True"
            )

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Create the folder; see ``StorageWriter``.

        Raises:
            FileExistsError: the folder holds a checkpoint.
        """
        if (Path(self.path) / METADATA).exists():
            raise FileExistsError(
                f"'{self.path}' holds a checkpoint, which others may need; save into a new folder (checkpoint_id=)"
            )
        return super().prepare_local_plan(plan)

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Tell all ranks which checkpoint they write a delta on; called on the coordinator."""
        self._previous = self._last()
        folder, save_id = self._previous or (None, None)
        return [
            replace(
                plan,
                storage_data=RankPlan(
                    inner=plan.storage_data,
                    delta_name=f"__{rank}.sd",
                    folder=os.path.abspath(self.path),
                    save_id=self.save_id,
                    previous=os.path.abspath(folder) if folder else None,
                    previous_id=save_id,
                ),
            )
            for rank, plan in enumerate(super().prepare_global_plan(plans))
        ]

    def _last(self) -> tuple[Path, str | None] | None:
        """Return the last checkpoint; None if the next one must be full."""
        complete = all((folder / METADATA).exists() for folder in self._chain)
        if not self._chain or not complete or len(self._chain) >= self._full_every:
            return None
        with Link(self._chain[0]) as link:
            return link.folder, link.save_id

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write the items of this rank; see ``StorageWriter``."""
        told = plan.storage_data
        if not isinstance(told, RankPlan) or told.folder != os.path.abspath(self.path):
            raise ValueError(
                "the plan is that of another save; DeltaStorageWriter needs a planner without cached plans"
                " (enable_plan_caching=False)"
            )
        now = {
            item.index: tensor
            for item in plan.items
            if (tensor := _tensor(item, planner)) is not None
        }
        before = self._before(told, now)
        results = self._write_delta(told, before, {index: now[index] for index in before})
        others = [item for item in plan.items if item.index not in before]
        done = super().write_data(replace(plan, items=others, storage_data=told.inner), planner)
        done.wait()
        self._keep(now, told.save_id)
        future: Future[list[WriteResult]] = Future()
        future.set_result([*results, *done.value()])
        return future

    def _before(self, told: RankPlan, now: Mapping[MetadataIndex, torch.Tensor]) -> Held:
        """Return the tensors of the last checkpoint that have the same place, dtype and shape as one of ``now``."""
        if told.previous is None:
            return {}
        held = self._held if self._held_id == told.previous_id else {}
        before = {i: held[i] for i, tensor in now.items() if i in held and _alike(held[i], tensor)}
        missing = [index for index in now if index not in held]
        if missing:
            with Link(told.previous) as link:
                if link.save_id != told.previous_id:
                    raise CheckpointError(f"'{told.previous}' was replaced while it was read")
                for index in missing:
                    if link.layout(index) == (now[index].dtype, now[index].shape):
                        before[index] = link.read(index)
        return before

    def _write_delta(self, told: RankPlan, before: Held, now: Held) -> list[WriteResult]:
        if not before:
            return []
        names = _names(before)
        old = Items({names[index]: tensor for index, tensor in before.items()})
        new = Items({names[index]: tensor for index, tensor in now.items()})
        with between(old, new, base_id=told.previous_id, level=self._level) as delta:
            delta.save(Path(told.folder) / told.delta_name, overwrite=True)
            sizes = {row.name: row.coded_bytes for row in delta.tensors}
        return [
            WriteResult(index, sizes[name], DeltaItem(told.delta_name, name))
            for index, name in names.items()
        ]

    def _keep(self, now: Held, save_id: str) -> None:
        """Copy what was saved to host memory."""
        self._held_id = None  # not valid if a copy fails
        if not self._keeps:
            return
        for index in self._held.keys() - now.keys():
            del self._held[index]
        for index, tensor in now.items():
            if index not in self._held or not _alike(self._held[index], tensor):
                self._held[index] = torch.empty(tensor.shape, dtype=tensor.dtype)
            integer_view(self._held[index]).copy_(integer_view(tensor))
        self._held_id = save_id

    def storage_meta(self) -> StorageMeta | None:
        """Return what identifies the checkpoint; for a delta also what it is a delta on."""
        if self._previous is None:
            return super().storage_meta()
        folder, save_id = self._previous
        previous = os.path.relpath(os.path.abspath(folder), os.path.abspath(self.path))
        return DeltaMeta(self.checkpoint_id, self.save_id, previous=previous, previous_id=save_id)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the metadata, which completes the checkpoint; called on the coordinator."""
        super().finish(metadata, results)
        self._chain = [Path(self.path), *(self._chain if self._previous else [])]
        self._previous = None


def _tensor(item: WriteItem, planner: SavePlanner) -> torch.Tensor | None:
    """Return the tensor of an item; None if it is not a tensor, or one that a delta cannot hold."""
    if item.type == WriteItemType.BYTE_IO:
        return None
    tensor = planner.resolve_data(item)
    if not isinstance(tensor, torch.Tensor) or tensor.layout is not torch.strided:
        return None
    tensor = tensor.detach()
    known = not tensor.is_quantized and wire_name(tensor.dtype) in SAVED_DTYPES
    return tensor if known and tensor.numel() else None


def _alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape


def _names(items: Iterable[MetadataIndex]) -> dict[MetadataIndex, str]:
    """Return the names of the rows of the delta file: name and offsets, and a number if two are equal."""
    names: dict[MetadataIndex, str] = {}
    taken: set[str] = set()
    for index in items:
        offsets = ",".join(map(str, index.offset or ()))
        name = f"{index.fqn}@{offsets}" if offsets else index.fqn
        while name in taken:
            name = f"{name}#{len(taken)}"
        taken.add(name)
        names[index] = name
    return names

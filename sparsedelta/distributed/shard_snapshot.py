"""``ShardSnapshot``: what was published last of a model that ranks divide, and one delta from it to the current state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from sparsedelta._typing import JSON, AnyPath
from sparsedelta.format.delta import Delta
from sparsedelta.format.records import Base
from sparsedelta.live.homes import Homes
from sparsedelta.live.shards import Shards
from sparsedelta.live.wire import Wire
from sparsedelta.ops.diff import check_json, coder_of


class ShardSnapshot:
    """A copy of the last published state of a model that FSDP2 or tensor parallelism divides among ranks.

    Each tensor has a home, a rank that holds it whole in host memory, beside its copy; each rank is the home of its share of
    the model. All ranks make a snapshot and call its methods at the same time, with the same arguments. The model must not
    change while a method runs. It can be used as a context, which closes it.
    """

    def __init__(self, model: torch.nn.Module, *, folder: AnyPath | None = None) -> None:
        """Send each tensor to its home, and compute the digests there.

        Args:
            model: a module whose parameters may be DTensors. Deltas have the names of its state dict.
            folder: a checkpoint with the tensors of the state dict, which rank 0 reads; deltas are then between folders
                with its files. None: they are between single files, as the state dict would be saved.

        Raises:
            StructureMismatch: a tensor is placed otherwise than in shards and replicas, or the folder has others.
            SparseDeltaError: another rank has failed, or the connection to it was lost.
        """
        self._wire = Wire()
        self._shards = Shards(model)
        self._homes = Homes(self._shards.held, folder=folder, carries_side_files=False)
        self._last: Delta | None = None

    def __enter__(self) -> ShardSnapshot:
        return self

    def __exit__(self, *exc: object) -> None:
        if exc[0] is None:  # else other ranks may have ended
            self.close()

    def diff(
        self,
        *,
        base_id: str | None = None,
        values: str = "ulp",
        level: str = "default",
        standalone: bool = False,
        info: Mapping[str, JSON] | None = None,
    ) -> Delta | None:
        """Return on rank 0 the delta from the last published state to the current one; None on the others.

        It has the bytes of the delta that ``sparsedelta.Snapshot.diff`` makes in one process, which explains the
        arguments. The snapshot does not change; see ``advance``.

        Raises:
            StructureMismatch: a rank holds other elements than before.
            ValueError: an argument is wrong.
            SparseDeltaError: another rank has failed, or the connection to it was lost.
        """

        def checked() -> Mapping[str, JSON]:
            coder_of(values=values, level=level, standalone=standalone)
            check_json({"base_id": base_id}, "base_id")
            return check_json(info or {}, "info")

        found = self._wire.together(checked)
        self._shards.update()

        def joined() -> Delta | None:
            if not self._wire.is_first:
                return None
            self._homes.capture()
            delta = self._homes.change(values=values, level=level, standalone=standalone)
            return replace(delta, base=Base(base_id), info=found)

        self._last = self._wire.together(joined)
        return self._last

    def advance(self, delta: Delta | None) -> None:
        """Move the snapshot to the target of a delta. Call this when the delta is stored safely.

        Args:
            delta: what ``diff`` has returned last on this rank.

        Raises:
            ValueError: rank 0 gives another delta.
            SparseDeltaError: another rank has failed, or the connection to it was lost.
        """

        def work() -> None:
            if self._wire.is_first:
                if delta is None or delta is not self._last:
                    raise ValueError("the delta is not the one that diff has returned last")
                self._homes.advance(delta)

        self._wire.together(work)

    def close(self) -> None:
        """Free the copies, on all ranks."""
        self._homes.close()

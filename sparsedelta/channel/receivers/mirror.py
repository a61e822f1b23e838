"""``Mirror``: the version of a channel that an engine has, for an engine that keeps weights in another layout than its checkpoint.

A version is first resolved and verified in host memory, under the names and shapes of the checkpoint. Then the engine's
own loader gets the changed elements, or all tensors if it is not certain which version the engine has.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from sparsedelta._typing import AnyPath
from sparsedelta.channel.entry import Entry
from sparsedelta.channel.following import Pursuit, SyncReport
from sparsedelta.channel.model_replica import ModelReplica
from sparsedelta.channel.versions import Versions
from sparsedelta.errors import Uncertain
from sparsedelta.live.host import host_state
from sparsedelta.live.patch import Patch
from sparsedelta.live.readback import find_unloaded, only_changed

if TYPE_CHECKING:
    import torch

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Changed:
    """The changed elements of one tensor.

    Attributes:
        name: the tensor's name in the checkpoint.
        tensor: all of it, in host memory; the engine must not write to it.
        index: flat indices, ``(nnz,)`` int32 or int64, increasing.
        values: the new values, ``(nnz,)``, in the tensor's dtype.
    """

    name: str
    tensor: torch.Tensor
    index: torch.Tensor
    values: torch.Tensor

    @property
    def has_nan(self) -> bool:
        """Whether a new value is NaN."""
        return self.values.dtype.is_floating_point and bool(self.values.float().isnan().any())

    @property
    def can_be_masked(self) -> bool:
        """Whether NaN can stand for the elements that have not changed."""
        dtype = self.values.dtype
        return dtype.is_floating_point and dtype.itemsize > 1 and not self.has_nan


LoadWhole: TypeAlias = "Callable[[Mapping[str, torch.Tensor]], None]"
LoadChanged: TypeAlias = Callable[[Sequence[Changed]], None]
Check: TypeAlias = Callable[[Sequence[Changed]], str | None]


class Mirror:
    """The version that an engine has, in host memory: as many bytes as the checkpoint.

    Not safe for use from several threads.
    """

    def __init__(
        self, channel: Versions, checkpoint: AnyPath, *, base: AnyPath | None = None
    ) -> None:
        """Read a checkpoint.

        Args:
            channel: the channel to follow.
            checkpoint: a checkpoint with the tensors of the channel's versions, such as the one that the engine
                has loaded. If it is a version of the channel, only later deltas are read.
            base: the checkpoint that the anchors are deltas on, if the publisher uses one.

        Raises:
            CheckpointError: the checkpoint cannot be read.
            StructureMismatch: the checkpoint has a tensor twice.
        """
        self._tensors = host_state(checkpoint)
        self._replica = _Recorder(self._tensors, base=base)
        self._pursuit = Pursuit(channel, self._replica)
        self._loaded: int | None = None

    @property
    def version(self) -> int | None:
        """The version that the engine has; None if it is not known."""
        return self._loaded

    def deliver(
        self,
        version: int | None,
        *,
        whole: LoadWhole,
        changed: LoadChanged | None = None,
        check: Check | None = None,
    ) -> SyncReport:
        """Move the engine to a version; return a report. After any error it is safe to call again.

        The loaders are called only after the version was read and verified. The first time all tensors are loaded.
        A version that the engine has already is not loaded again. If ``changed`` fails, or the engine then holds other
        values, all tensors are loaded.

        Args:
            version: its number; None for the latest.
            whole: loads all tensors, by name, into the engine.
            changed: loads changed elements into the engine, which has the version before; None: all tensors are
                always loaded.
            check: returns the name of a tensor of which the engine holds other values than ``changed`` has loaded, or
                None; see ``find_wrong``. None: the values are not read back.

        Raises:
            Behind: the channel does not have the version yet, or no longer. The engine was not changed.
            BadVersion: an entry or object is damaged. The engine was not changed.
            Uncertain: the engine's loader failed, or the copy in host memory was changed by something else. The next
                call rebuilds what is in doubt.
            StructureMismatch: the version has other tensors than the checkpoint.
            OSError, RemoteError: the store failed.
        """
        self._replica.written = None
        report = self._pursuit.sync(version)
        if self._loaded == report.version:
            return report
        written = self._replica.written
        is_next = self._loaded is not None and self._loaded == report.before
        self._loaded = None  # until a loader has returned
        if not (
            is_next and written is not None and changed and self._load(changed, check, written)
        ):
            try:
                whole(self._tensors)
            except Exception as error:
                raise Uncertain(
                    f"the engine failed to load version {report.version}, so it may hold a part of it: {error};"
                    " do not serve from it; the next call loads all tensors"
                ) from error
        self._loaded = report.version
        return report

    def _load(self, changed: LoadChanged, check: Check | None, patches: Sequence[Patch]) -> bool:
        try:
            elements = [self._changed(patch) for patch in patches]
            changed(elements)
            wrong = check(elements) if check else None
            if wrong:
                raise RuntimeError(f"it holds other values of tensor {wrong!r} than it has loaded")
        except Exception as error:
            _log.warning(
                "the engine cannot load changed elements, so all tensors follow: %s", error
            )
            return False
        return True

    def _changed(self, patch: Patch) -> Changed:
        name = patch.place.row.name
        tensor = self._tensors[name]
        return Changed(name, tensor, patch.index, patch.after.view(tensor.dtype))


def find_wrong(
    model: torch.nn.Module, changed: Sequence[Changed], device: torch.device
) -> str | None:
    """Return the name of a tensor of which an engine's model holds other values than were loaded; None if there is none.

    Args:
        model: has a method ``load_weights``; see ``find_unloaded``.
        changed: what was loaded. Only these elements are compared, if their dtype has NaN.
        device: where the model's tensors are.
    """
    load: Any = model.load_weights
    masked = [one for one in changed if one.can_be_masked]
    parts = ((one.name, only_changed(one.tensor, one.index, one.values, device)) for one in masked)
    wrong = find_unloaded(model, load, parts, nan=True) if masked else None
    rest = [(one.name, one.tensor) for one in changed if not one.can_be_masked]
    return wrong or (find_unloaded(model, load, rest, nan=False) if rest else None)


class _Recorder(ModelReplica):
    """A state dict; it remembers which elements the last move has changed.

    Attributes:
        written: the changes; None: all tensors were written, or nothing was.
    """

    written: Sequence[Patch] | None = None

    def _write(
        self, patches: Sequence[Patch], to: Entry, becomes: Callable[[Entry | None], None]
    ) -> None:
        super()._write(patches, to, becomes)
        self.written = patches

"""Decoded changes of a model's tensors, and a writer that writes all of them or none.

The writer records the patches before the first write and clears the record after the last. If a write was
broken off and not undone, the record still exists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sparsedelta.errors import PartlyApplied
from sparsedelta.interrupts import uninterrupted
from sparsedelta.live.held import Held, scatter
from sparsedelta.live.slots import Place, current_tensor

if TYPE_CHECKING:
    import torch


_GROUP_ELEMENTS = 1 << 22  # 48 MiB of indices in both forms


@dataclass(frozen=True, slots=True)
class Patch:
    """The touched elements of one tensor, decoded, on the model's device.

    Attributes:
        place: the tensor of the delta, and where the model holds it.
        index: flat indices, (nnz,), strictly increasing; int32 if the tensor has at most 2^31 elements, else int64.
        index_digest: digest of the indices, computed on the host; comparing digests needs no device work.
        before: bits of the elements in the base, (nnz,) integers of the element size.
        after: bits of the elements in the target, same shape and dtype.
    """

    place: Place
    index: torch.Tensor
    index_digest: bytes
    before: torch.Tensor
    after: torch.Tensor

    @property
    def n_bytes(self) -> int:
        """Memory of the tensors in bytes."""
        return sum(t.numel() * t.element_size() for t in (self.index, self.before, self.after))

    def reversed(self) -> Patch:
        """Return the patch that undoes this one."""
        return Patch(self.place, self.index, self.index_digest, self.after, self.before)

    def in_step(self, found: dict[str, Held] | None = None) -> Patch:
        """Return the patch, moved to the current device of the model's tensor.

        Args:
            found: see ``current_tensor``.

        Raises:
            StructureMismatch: the model's tensor has changed; see ``current_tensor``.
        """
        device = current_tensor(self.place, found).device
        if device == self.index.device:
            return self
        index, before, after = (t.to(device) for t in (self.index, self.before, self.after))
        return replace(self, index=index, before=before, after=after)


class HalfWritten(PartlyApplied):
    """A write to a model in memory was broken off and could not be undone; the model holds a mixture."""

    def __init__(self, n_tensors: int, restore: Callable[[], None]) -> None:
        super().__init__(
            f"a write to {n_tensors} tensors of the model was broken off and could not be undone: some may"
            " hold new values and others old ones; call restore() to undo the write"
        )
        self._restore = restore

    def restore(self) -> None:
        """Write back the values that the model had before."""
        self._restore()


class Writer:
    """Writes patches to a model and records what the model holds.

    Args:
        holds: a name for what the model holds now.
    """

    def __init__(self, holds: str | None = None) -> None:
        # (what the model held, patches being written), one attribute so that both change in one assignment.
        self._state: tuple[str | None, Sequence[Patch]] = (holds, ())

    @property
    def holds(self) -> str | None:
        """The name of what the model holds.

        Raises:
            HalfWritten: a write was broken off and not undone.
        """
        name, unfinished = self._state
        if unfinished:
            raise HalfWritten(len(unfinished), self.restore)
        return name

    def write(
        self,
        patches: Sequence[Patch],
        becomes: str | None = None,
        *,
        found: Mapping[str, Held] | None = None,
    ) -> None:
        """Write the ``after`` values of all patches, in order.

        On an exception or interrupt, the ``before`` values are written back.

        Args:
            patches: on the devices of the model's tensors; see ``Patch.in_step``.
            becomes: a name for what the model holds afterwards.
            found: the model's tensors by the names of their slots, if they were found just now.

        Raises:
            HalfWritten: this or an earlier write was broken off and could not be undone.
        """
        held = self.holds
        with uninterrupted():
            self._state = held, patches
            try:
                for patch, index in _with_wide_index(patches):
                    slot = patch.place.slot
                    tensor = (found or {}).get(slot.name)
                    scatter(slot.tensor() if tensor is None else tensor, index, patch.after)
            except BaseException as error:
                try:
                    self._undo()
                except BaseException:
                    raise HalfWritten(len(patches), self.restore) from error
                raise
            self._state = becomes, ()

    def restore(self) -> None:
        """Undo a write that was broken off; do nothing if there is none."""
        with uninterrupted():
            self._undo()

    def _undo(self) -> None:
        held, unfinished = self._state
        for patch in [patch.in_step() for patch in reversed(unfinished)]:
            scatter(patch.place.slot.tensor(), patch.index, patch.before)
        self._state = held, ()


def _with_wide_index(patches: Sequence[Patch]) -> Iterator[tuple[Patch, torch.Tensor]]:
    """Yield each patch with its index as int64, which torch needs for writing.

    The indices of many small patches are converted together, because each operation on a GPU takes time to start.
    """
    import torch

    group: list[Patch] = []
    n_elements = 0
    for patch in [*patches, None]:
        fits = patch and n_elements + patch.index.numel() <= _GROUP_ELEMENTS
        if group and not (fits and patch and patch.index.device == group[0].index.device):
            sizes = [one.index.numel() for one in group]
            wide = torch.cat([one.index for one in group]).long().split(sizes)
            yield from zip(group, wide, strict=True)
            group, n_elements = [], 0
        if patch:
            group.append(patch)
            n_elements += patch.index.numel()

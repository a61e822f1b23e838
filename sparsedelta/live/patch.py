"""Decoded changes of a model's tensors, and how they are written: all of them, or none.

A model that is neither is marked as such before the first write, and the mark goes with the last one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sparsedelta.errors import PartlyApplied
from sparsedelta.interrupts import uninterrupted
from sparsedelta.live.held import scatter
from sparsedelta.live.slots import Place, check_in_step

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Patch:
    """The touched elements of one tensor, decoded, on the model's device.

    Attributes:
        place: which tensor, and where the model holds it.
        index: flat indices, (nnz,) int32 where the tensor's size allows it, else int64, increasing.
        index_digest: of the indices, made on the host: comparing it asks nothing of the device.
        before: their bits in the base, (nnz,) integers of the element size.
        after: their bits in the target.
    """

    place: Place
    index: torch.Tensor
    index_digest: bytes
    before: torch.Tensor
    after: torch.Tensor

    @property
    def n_bytes(self) -> int:
        """What it takes to keep."""
        return sum(t.numel() * t.element_size() for t in (self.index, self.before, self.after))

    def reversed(self) -> Patch:
        """Return the patch from after to before."""
        return replace(self, before=self.after, after=self.before)

    def in_step(self) -> Patch:
        """Return the patch on the device on which its tensor is now.

        Raises:
            StructureMismatch: the tensor has become one of another kind.
        """
        device = check_in_step(self.place).device
        if device == self.index.device:
            return self
        index, before, after = (t.to(device) for t in (self.index, self.before, self.after))
        return replace(self, index=index, before=before, after=after)


class HalfWritten(PartlyApplied):
    """Writing to a model in memory was broken off, and what was written could not be taken back."""

    def __init__(self, n_tensors: int, restore: Callable[[], None]) -> None:
        super().__init__(
            f"a write to {n_tensors} tensors of the model was broken off and could not be taken back, so"
            " that some may hold new values and others old ones; call restore() to take it back"
        )
        self._restore = restore

    def restore(self) -> None:
        """Give the model the values back that it had before."""
        self._restore()


class Writer:
    """Writes to a model, and knows what the model holds.

    Args:
        holds: a name for what the model holds.
    """

    def __init__(self, holds: str | None = None) -> None:
        # One attribute, so that both change at once: what the model held, and what is being written.
        self._state: tuple[str | None, Sequence[Patch]] = (holds, ())

    @property
    def holds(self) -> str | None:
        """What the model holds.

        Raises:
            HalfWritten: it is between two states.
        """
        name, begun = self._state
        if begun:
            raise HalfWritten(len(begun), self.restore)
        return name

    def write(self, patches: Sequence[Patch], becomes: str | None = None) -> None:
        """Set the elements of all patches, in order, to what they are afterwards.

        On an exception, an interrupt included, they get back what they were before.

        Args:
            patches: in step with the model.
            becomes: a name for what the model holds then.

        Raises:
            HalfWritten: they could not get it back, now or earlier.
        """
        held = self.holds
        with uninterrupted():
            self._state = held, patches
            try:
                for patch in patches:
                    scatter(patch.place.slot.tensor(), patch.index, patch.after)
            except BaseException as error:
                try:
                    self._take_back()
                except BaseException:
                    raise HalfWritten(len(patches), self.restore) from error
                raise
            self._state = becomes, ()

    def restore(self) -> None:
        """Take back what was begun and could not be taken back; nothing if there is no such thing."""
        with uninterrupted():
            self._take_back()

    def _take_back(self) -> None:
        held, begun = self._state
        for patch in [patch.in_step() for patch in reversed(begun)]:
            scatter(patch.place.slot.tensor(), patch.index, patch.before)
        self._state = held, ()

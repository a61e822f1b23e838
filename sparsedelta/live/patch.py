"""Decoded changes of a model's tensors, and a writer that writes all of them or none.

The writer records the patches before the first write and clears the record after the last. If a write was
broken off and not undone, the record still exists.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sparsedelta.errors import PartlyApplied, StructureMismatch
from sparsedelta.interrupts import uninterrupted
from sparsedelta.live.divided import Divided
from sparsedelta.live.fused import Write, Writes, kernels_for
from sparsedelta.live.held import Held, memory_in_order, scatter
from sparsedelta.live.places import Place, current_tensor
from sparsedelta.live.ranks import Alone, Group
from sparsedelta.live.slots import Slot
from sparsedelta.live.strides import Region
from sparsedelta.live.wire import RankLost

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
        regions: if the tensor is divided among ranks, the elements that this rank held when the patch was made. The
            patch has the touched ones of these.
    """

    place: Place
    index: torch.Tensor
    index_digest: bytes
    before: torch.Tensor
    after: torch.Tensor
    regions: tuple[Region, ...] | None = None

    @property
    def n_bytes(self) -> int:
        """Memory of the tensors in bytes."""
        return sum(t.numel() * t.element_size() for t in (self.index, self.before, self.after))

    def reversed(self) -> Patch:
        """Return the patch that undoes this one."""
        return replace(self, before=self.after, after=self.before)

    def in_step(self, found: dict[str, Held] | None = None) -> Patch:
        """Return the patch, moved to the current device of the model's tensor.

        Args:
            found: see ``current_tensor``.

        Raises:
            StructureMismatch: the model's tensor has changed; see ``current_tensor``.
        """
        tensor = current_tensor(self.place, found)
        if regions_of(tensor) != self.regions:
            raise StructureMismatch(
                f"tensor {self.place.slot.name!r} is divided otherwise among the ranks than when the delta was"
                " decoded; nothing was written",
                tensor=self.place.row.name,
            )
        device = tensor.device
        if device == self.index.device:
            return self
        index, before, after = (t.to(device) for t in (self.index, self.before, self.after))
        return replace(self, index=index, before=before, after=after)


def regions_of(tensor: Held) -> tuple[Region, ...] | None:
    """Return the flat indices of the elements that this rank holds of a tensor; None if no other rank holds any."""
    return tensor.regions if isinstance(tensor, Divided) else None


class Plan:
    """What is written to which tensors, in an order that gives the result of one patch after the other.

    Args:
        patches: on the devices of the model's tensors; see ``Patch.in_step``.
        found: the model's tensors by the names of their slots, if they were found just now.
    """

    def __init__(self, patches: Sequence[Patch], found: Mapping[str, Held] | None = None) -> None:
        self.patches = patches
        names = [patch.place.slot.name for patch in patches]
        held = dict(found or {})
        for name, patch in zip(names, patches, strict=True):
            if name not in held:
                held[name] = patch.place.slot.tensor()
        self._held = [held[name] for name in names]
        self._stages = [self._prepared(stage) for stage in _without_repetition(names)]
        self._traits = self._current_traits()

    def is_current(self) -> bool:
        """Return whether the model still holds all tensors in the same memory; False if that takes long to find out."""
        return self._traits is not None and self._traits == self._current_traits()

    def run(self) -> None:
        """Write all values."""
        for fused, rest in self._stages:
            for writes in fused:
                writes.run()
            for number, index in _with_wide_index(self.patches, rest):
                scatter(self._held[number], index, self.patches[number].after)

    def _current_traits(self) -> list[object] | None:
        import torch

        found: list[object] = [torch.is_inference_mode_enabled()]
        for patch in self.patches:
            for slot in (patch.place.slot, *patch.place.tied):
                tensor = slot.tensor()
                if not isinstance(slot, Slot) or not isinstance(tensor, torch.Tensor):
                    return None
                found.append((id(tensor), tensor.data_ptr(), tensor.shape, tensor.dtype))
        return found

    def _prepared(self, stage: Sequence[int]) -> tuple[list[Writes], list[int]]:
        """Return how to write patches of different tensors: in few launches for each GPU, and the patches left."""
        groups: dict[torch.device, list[Write]] = defaultdict(list)
        rest = []
        for number in stage:
            patch = self.patches[number]
            device, memory = patch.index.device, None
            if kernels_for(device):
                memory = memory_in_order(self._held[number])
            if memory is None:
                rest.append(number)
            else:
                groups[device].append(Write(memory, patch.index, patch.after))
        return [Writes(group, kernels_for(device)) for device, group in groups.items()], rest


def _without_repetition(names: Sequence[str]) -> Iterator[Sequence[int]]:
    """Yield the numbers of names, in order, in parts in which each name is there only once."""
    start, seen = 0, set[str]()
    for number, name in enumerate(names):
        if name in seen:
            yield range(start, number)
            start, seen = number, set()
        seen.add(name)
    yield range(start, len(names))


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
        group: the processes that write to the model together; all of them write, or none.
    """

    def __init__(self, holds: str | None = None, group: Group | None = None) -> None:
        self._group = group or Alone()
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

    def write(self, what: Plan | Sequence[Patch], becomes: str | None = None) -> None:
        """Write the ``after`` values of all patches, in order.

        On an exception or interrupt, the ``before`` values are written back.

        Args:
            what: patches on the devices of the model's tensors (``Patch.in_step``), or their plan.
            becomes: a name for what the model holds afterwards.

        Raises:
            HalfWritten: this or an earlier write was broken off and could not be undone.
        """
        held = self.holds
        with self._group.entered(), uninterrupted():
            plan = what if isinstance(what, Plan) else self._group.together(lambda: Plan(what))
            self._state = held, plan.patches
            try:
                self._group.together(plan.run)
            except BaseException as error:
                try:
                    # Of a lost rank nothing can be learnt; asking again may wait for the time limit again.
                    self._undo(Alone() if isinstance(error, RankLost) else self._group)
                except BaseException:
                    raise HalfWritten(len(plan.patches), self.restore) from error
                raise
            self._state = becomes, ()

    def restore(self) -> None:
        """Undo a write that was broken off; do nothing if there is none. All processes of the group call this."""
        with self._group.entered(), uninterrupted():
            self._undo(self._group)

    def _undo(self, group: Group) -> None:
        held, unfinished = self._state
        done = []

        def work() -> None:
            for patch in [patch.in_step() for patch in reversed(unfinished)]:
                scatter(patch.place.slot.tensor(), patch.index, patch.before)
            done.append(True)

        try:
            if unfinished:
                group.together(work, interruptible=False)
        except RankLost:
            if not done:
                raise
        self._state = held, ()


def _with_wide_index(
    patches: Sequence[Patch], numbers: Sequence[int]
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield numbers of patches, each with the patch's index as int64, which torch needs for writing.

    The indices of many small patches are converted together, because each operation on a GPU takes time to start.
    """
    import torch

    group: list[int] = []
    n_elements = 0
    for number in [*numbers, None]:
        index = None if number is None else patches[number].index
        fits = index is not None and n_elements + index.numel() <= _GROUP_ELEMENTS
        if group and not (
            fits and index is not None and index.device == patches[group[0]].index.device
        ):
            held = [patches[one].index for one in group]
            wide = torch.cat(held).long().split([one.numel() for one in held])
            yield from zip(group, wide, strict=True)
            group, n_elements = [], 0
        if number is not None and index is not None:
            group.append(number)
            n_elements += index.numel()

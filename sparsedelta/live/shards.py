"""A model that is divided among the ranks of ``torch.distributed`` (FSDP2, tensor parallelism), whole on rank 0 in host memory.

Elements that have changed go to rank 0, one tensor at a time; in the first call these are all. Nothing is gathered on a device.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from sparsedelta._typing import Model
from sparsedelta.codecs.context import Bits
from sparsedelta.errors import StructureMismatch
from sparsedelta.live.bits import flat_bits, integer_view, on_host

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

Name = TypeVar("Name", bound=Hashable)
_Sent = tuple[npt.NDArray[np.int64], Bits]  # flat indices in the whole tensor, and bits


@dataclass(frozen=True, slots=True)
class HeldPart:
    """What a rank holds of a tensor.

    Attributes:
        shape: of the whole tensor.
        local: shape of the part.
        offset: where the part begins in each direction.
        is_sent: whether this rank sends it; other ranks may hold it too.
    """

    shape: tuple[int, ...]
    local: tuple[int, ...]
    offset: tuple[int, ...]
    is_sent: bool = True

    def sent(self, at: npt.NDArray[np.int64], bits: Bits) -> _Sent | None:
        """Return what is sent of elements at flat indices in the part, ``(n,)``."""
        return (self.in_whole(at), bits) if self.is_sent else None

    @property
    def n_sent(self) -> int:
        """How many elements this rank sends."""
        return math.prod(self.local) if self.is_sent else 0

    def in_whole(self, at: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the flat indices in the whole tensor, ``(n,)``, of flat indices in the part; the order is the same."""
        if not len(at) or not self.shape:
            return at
        places = np.unravel_index(at, self.local)
        whole = [place + start for place, start in zip(places, self.offset, strict=True)]
        return np.ravel_multi_index(whole, self.shape).astype(np.int64)

    def n_before(self, end: int) -> int:
        """Return how many elements of the part have a flat index below ``end`` in the whole tensor."""
        n_inner, n_held = math.prod(self.shape), math.prod(self.local)
        found = 0
        if end >= n_inner:
            return n_held
        for size, own, offset in zip(self.shape, self.local, self.offset, strict=True):
            n_inner, n_held = n_inner // size, n_held // own if own else 0
            place, end = divmod(end, n_inner)
            place -= offset
            if not 0 <= place < own:
                return found + (n_held * own if place >= own else 0)
            found += place * n_held
        return found


class Shards:
    """The part of a model that this rank holds, and on rank 0 the whole model. All methods are called on all ranks.

    Attributes:
        whole: on rank 0 the whole model in host memory: the module that was given, or a state dict; else None.
    """

    def __init__(self, model: torch.nn.Module, *, whole: torch.nn.Module | None = None) -> None:
        """Send all elements to rank 0.

        Args:
            model: a module whose parameters may be DTensors. The names and parts must not change later.
            whole: on rank 0 a module in host memory with the same names, such as the model before it was divided.

        Raises:
            StructureMismatch: a tensor has another placement than shards and replicas, or ``whole`` has other tensors.
        """
        import torch.distributed as dist

        self._model = model
        self._rank = dist.get_rank()
        state = self._state()
        self._parts = parts_of_ranks(state)[self._rank]
        self._copies: dict[str, Bits] = {}
        self._given = None if whole is None else dict(whole.state_dict())
        self._places: dict[str, torch.Tensor] = {}
        problem = None
        for name, tensor in state.items():
            copy = self._copies[name] = _bits(local_of(tensor)).copy()
            parts = self._gather(self._parts[name].sent(np.arange(len(copy)), copy))
            if self._rank == 0:
                problem = problem or self._place(name, tensor, parts)
        self.whole: Model | None = None
        if self._rank == 0:
            self.whole = self._places if whole is None else whole
        tell(problem)

    def update(self) -> None:
        """Send the elements that have changed since the last call to rank 0, and write them to the whole model."""
        for name, tensor in self._state().items():
            copy, now = self._copies[name], _bits(local_of(tensor))
            if len(now) != len(copy):
                raise StructureMismatch(
                    f"tensor {name!r} has {len(now)} elements on this rank, expected {len(copy)}; make a new"
                    " publisher",
                    tensor=name,
                )
            at = np.flatnonzero(now != copy)
            copy[at] = now[at]
            for sent in self._gather(self._parts[name].sent(at, copy[at])):
                self._write(name, sent)

    def _state(self) -> Mapping[str, torch.Tensor]:
        return {name: tensor.detach() for name, tensor in self._model.state_dict().items()}

    def _gather(self, sent: _Sent | None) -> list[_Sent]:
        """Return on rank 0 what all ranks send; nothing on the others."""
        import torch.distributed as dist

        found: list[Any] | None = [None] * dist.get_world_size() if self._rank == 0 else None
        dist.gather_object(sent, found, dst=0)
        return [one for one in found or () if one is not None]

    def _place(self, name: str, tensor: torch.Tensor, parts: list[_Sent]) -> str | None:
        """Write a whole tensor for the first time; return what is wrong, if anything."""
        import torch

        counts = np.zeros(tensor.numel(), np.uint8)
        for index, _ in parts:
            counts[index] += 1
        if not (counts == 1).all():
            return f"the ranks do not hold each element of tensor {name!r} once"
        place = torch.empty(tuple(tensor.shape), dtype=tensor.dtype)
        if self._given is not None:
            given = self._given.get(name)
            if given is None or (given.shape, given.dtype) != (place.shape, place.dtype):
                return (
                    f"the whole model has no tensor {name!r} of {place.dtype} {list(place.shape)}"
                )
            if given.device.type != "cpu" or not given.is_contiguous():
                return f"tensor {name!r} of the whole model is not contiguous in host memory"
            place = given
        self._places[name] = place
        for part in parts:
            self._write(name, part)
        return None

    def _write(self, name: str, sent: _Sent) -> None:
        index, bits = sent
        _bits(self._places[name])[index] = bits


def tell(problem: str | None) -> None:
    """Raise an error on all ranks if rank 0 names a problem.

    Raises:
        StructureMismatch: it does.
    """
    told = shared(problem)
    if told:
        raise StructureMismatch(told)


def shared(value: Any) -> Any:
    """Return the value of rank 0 on all ranks."""
    import torch.distributed as dist

    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def parts_of_ranks(
    tensors: Mapping[Name, torch.Tensor], group: dist.ProcessGroup | None = None
) -> list[dict[Name, HeldPart]]:
    """Return what each rank holds of each tensor. Of parts that several ranks hold, the first rank sends them.

    Args:
        tensors: plain tensors and DTensors.
        group: the ranks; None: all.

    Raises:
        StructureMismatch: a tensor has another placement than shards and replicas.
    """
    import torch.distributed as dist

    own = {name: _part(name, tensor) for name, tensor in tensors.items()}
    held: list[Any] = [own]
    if dist.is_initialized():
        held = [None] * dist.get_world_size(group)
        dist.all_gather_object(held, own, group=group)
    seen: set[tuple[Name, HeldPart]] = set()
    found = []
    for parts in held:
        found.append({n: replace(part, is_sent=(n, part) not in seen) for n, part in parts.items()})
        seen |= {*parts.items()}
    return found


def _part(name: object, tensor: Any) -> HeldPart:
    """Return what this rank holds of a tensor."""
    from torch.distributed.tensor import DTensor, Replicate, Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    shape = tuple(tensor.shape)
    if not isinstance(tensor, DTensor):
        return HeldPart(shape, shape, (0,) * len(shape))
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, placements = tensor.device_mesh, tensor.placements
    # FSDP2 over tensor parallelism: a shard of the rows that the other direction holds.
    kinds = Shard, Replicate, _StridedShard
    if not all(isinstance(one, kinds) for one in placements):
        raise StructureMismatch(
            f"tensor {name!r} is placed as {placements}, expected shards or replicas",
            tensor=str(name),
        )
    local, offset = compute_local_shape_and_global_offset(shape, mesh, placements)
    return HeldPart(shape, tuple(local), tuple(offset))


def local_of(tensor: Any) -> torch.Tensor:
    """Return the part of a tensor that this rank holds, in the same memory; a plain tensor itself."""
    to_local = getattr(tensor, "to_local", None)
    found: torch.Tensor = to_local() if to_local else tensor
    return found


def _bits(tensor: torch.Tensor) -> Bits:
    """Return the bits of a tensor, in row-major order, ``(numel,)``: its own memory if it is contiguous on the host."""
    width = tensor.element_size()
    found: Bits = on_host(flat_bits(integer_view(tensor).contiguous())).view(f"<u{width}")
    return found

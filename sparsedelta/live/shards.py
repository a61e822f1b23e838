"""A model that is divided among the ranks of ``torch.distributed`` (FSDP2, tensor parallelism), whole on rank 0 in host memory.

Elements that have changed go to rank 0, one tensor at a time; in the first call these are all. Nothing is gathered on a device.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from sparsedelta._typing import Model
from sparsedelta.codecs.context import Bits
from sparsedelta.errors import StructureMismatch
from sparsedelta.live.bits import flat_bits, integer_view, on_host

if TYPE_CHECKING:
    import torch

_Sent = tuple[npt.NDArray[np.int64], Bits]  # flat indices in the whole tensor, and bits


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
        self._parts = {name: _indices(name, tensor) for name, tensor in state.items()}
        self._copies: dict[str, Bits] = {}
        self._given = None if whole is None else dict(whole.state_dict())
        self._places: dict[str, torch.Tensor] = {}
        problem = None
        for name, tensor in state.items():
            here = _local(tensor)
            self._copies[name] = _bits(here).copy()
            parts = self._gather(self._all(name))
            if self._rank == 0:
                problem = problem or self._place(name, tensor, parts)
        self.whole: Model | None = None
        if self._rank == 0:
            self.whole = self._places if whole is None else whole
        tell(problem)

    def update(self) -> None:
        """Send the elements that have changed since the last call to rank 0, and write them to the whole model."""
        for name, tensor in self._state().items():
            copy, now = self._copies[name], _bits(_local(tensor))
            if len(now) != len(copy):
                raise StructureMismatch(
                    f"tensor {name!r} has {len(now)} elements on this rank, expected {len(copy)}; make a new"
                    " publisher",
                    tensor=name,
                )
            at = np.flatnonzero(now != copy)
            copy[at] = now[at]
            index = self._parts[name]
            for sent in self._gather(None if index is None else (index[at], copy[at])):
                self._write(name, sent)

    def _state(self) -> Mapping[str, torch.Tensor]:
        return {name: tensor.detach() for name, tensor in self._model.state_dict().items()}

    def _all(self, name: str) -> _Sent | None:
        index = self._parts[name]
        return None if index is None else (index, self._copies[name])

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


def _indices(name: str, tensor: Any) -> npt.NDArray[np.int64] | None:
    """Return the flat indices in the whole tensor of what this rank holds; None if another rank sends it."""
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor

    if not isinstance(tensor, DTensor):
        return np.arange(tensor.numel()) if dist.get_rank() == 0 else None
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, placements = tensor.device_mesh, tensor.placements
    if not all(one.is_shard() or one.is_replicate() for one in placements):
        raise StructureMismatch(
            f"tensor {name!r} is placed as {placements}, expected shards or replicas", tensor=name
        )
    if any(one.is_replicate() and mesh.get_local_rank(i) for i, one in enumerate(placements)):
        return None
    local, offset = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
    found = np.zeros((1,) * len(local), np.int64)
    for axis, (size, first, n) in enumerate(zip(local, offset, tensor.shape, strict=True)):
        line = np.arange(first, first + size).reshape(
            [-1 if a == axis else 1 for a in range(len(local))]
        )
        found = found * n + line
    return found.reshape(-1)


def _local(tensor: Any) -> torch.Tensor:
    to_local = getattr(tensor, "to_local", None)
    found: torch.Tensor = to_local() if to_local else tensor
    return found


def _bits(tensor: torch.Tensor) -> Bits:
    """Return the bits of a tensor, in row-major order, ``(numel,)``: its own memory if it is contiguous on the host."""
    width = tensor.element_size()
    found: Bits = on_host(flat_bits(integer_view(tensor).contiguous())).view(f"<u{width}")
    return found

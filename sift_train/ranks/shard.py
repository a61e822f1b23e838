"""``Shard``: the part of a DTensor that this rank holds, as FSDP2 and tensor parallelism make it.

Trained components are kept by their flat index in this part. Files and comparisons with an unsharded
model use the flat index in the whole tensor.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sift_train.ranks.group import Ranks


def is_sharded(tensor: Tensor) -> bool:
    """Return whether a tensor is a DTensor, of which each rank holds a part."""
    loaded: Any = sys.modules.get("torch.distributed.tensor")  # importing it takes half a second
    return loaded is not None and isinstance(tensor, loaded.DTensor)


def local_part(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this rank holds, in the same memory; a plain tensor itself."""
    detached: Any = tensor.detach()
    part: Tensor = detached.to_local() if is_sharded(tensor) else detached
    return part


def whole_or_self(tensor: Tensor) -> Tensor:
    """Return the whole of a DTensor, gathered from all shards; a plain tensor itself."""
    held: Any = tensor
    whole: Tensor = held.full_tensor() if is_sharded(tensor) else held
    return whole


def local_gradient(parameter: Tensor) -> Tensor | None:
    """Return this rank's part of a parameter's gradient, laid out as the parameter."""
    gradient: Any = parameter.grad
    if gradient is None or not is_sharded(gradient):
        return None if gradient is None else gradient
    own: Any = parameter
    if gradient.placements != own.placements:
        gradient = gradient.redistribute(
            placements=own.placements
        )  # such as a sum still to be done
    return local_part(gradient)


def reshard(model: nn.Module) -> None:
    """Free the unsharded parameters of FSDP2, which a write to the shards does not change."""
    for module in fsdp_modules(model):
        module.reshard()


def fsdp_modules(model: nn.Module) -> list[Any]:
    """Return the modules of a model to which ``fully_shard`` was applied."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")  # loaded, if fully_shard was called
    kind = getattr(fsdp, "FSDPModule", None)
    return [] if kind is None else [each for each in model.modules() if isinstance(each, kind)]


class Shard:
    """Where a rank's part of a DTensor lies in the whole tensor.

    Attributes:
        shape: of the whole tensor.
        numel: number of elements of the whole tensor.
        number: of this part, counted from 0 in the order of the mesh.
        n_parts: number of parts that make the whole tensor.
        n_ranks: number of ranks that hold a part; more than ``n_parts`` if parts are replicated.
        offset: where the part begins in each dimension.
        is_first_copy: whether this rank is the one that writes the part.

    Args:
        tensor: a DTensor whose placements are ``Shard`` or ``Replicate``.

    Raises:
        ValueError: it has another placement.
    """

    def __init__(self, tensor: Any) -> None:
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        mesh, placements = tensor.device_mesh, tensor.placements
        if not all(each.is_shard() or each.is_replicate() for each in placements):
            raise ValueError(f"placements {placements} are not shards or replicas")
        self.shape: tuple[int, ...] = tuple(tensor.shape)
        self.numel: int = math.prod(self.shape)
        self.n_ranks: int = mesh.size()
        local, offset = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
        self._local_shape = tuple(local)
        self.offset: tuple[int, ...] = tuple(offset)
        self.groups: tuple[dist.ProcessGroup, ...] = ()
        self.number, self.n_parts, self.is_first_copy = 0, 1, True
        for axis, placement in enumerate(placements):
            at = mesh.get_local_rank(axis)
            if placement.is_shard():
                self.groups += (mesh.get_group(axis),)
                self.number = self.number * mesh.size(axis) + at
                self.n_parts *= mesh.size(axis)
            else:
                self.is_first_copy = self.is_first_copy and at == 0

    def sum_(self, tensor: Tensor) -> Tensor:
        """Replace a tensor by its sum over the parts of the whole tensor, and return it."""
        for group in self.groups:
            Ranks(group).sum_(tensor)
        return tensor

    def cut(self, whole: Tensor) -> Tensor:
        """Return this part of a tensor of the whole shape."""
        return whole[self.spans].contiguous()

    @property
    def spans(self) -> tuple[slice, ...]:
        """The slices of the whole tensor that make this part."""
        pairs = zip(self.offset, self._local_shape, strict=True)
        return tuple(slice(start, start + size) for start, size in pairs)

    def to_whole(self, index: Tensor) -> Tensor:
        """Return flat indices in the whole tensor, int64, of flat indices in this part."""
        if not self._local_shape or not len(index):
            return index.long()
        places = torch.unravel_index(index.long(), self._local_shape)
        whole = torch.zeros_like(index, dtype=torch.int64)
        for place, start, size in zip(places, self.offset, self.shape, strict=True):
            whole = whole * size + place + start
        return whole

    def to_part(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return which flat indices of the whole tensor are in this part, and their indices in it."""
        if not self.shape:
            return torch.ones_like(index, dtype=torch.bool), index.long()
        is_inside = torch.ones_like(index, dtype=torch.bool)
        part = torch.zeros_like(index, dtype=torch.int64)
        places = torch.unravel_index(index.long(), self.shape)
        for place, start, size in zip(places, self.offset, self._local_shape, strict=True):
            is_inside &= (place >= start) & (place < start + size)
            part = part * size + place - start
        return is_inside, part[is_inside]


def shard_of(tensor: Tensor) -> Shard | None:
    """Return the shard that this rank holds of a DTensor, None for a plain tensor."""
    return Shard(tensor) if is_sharded(tensor) else None

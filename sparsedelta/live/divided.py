"""``Divided``: a checkpoint's tensor of which this rank holds some elements, and other ranks the others.

Reading is done by all ranks together, at most one chunk or block of elements at a time. Each rank writes the elements that it
holds. Nothing is gathered in whole.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from sparsedelta.codecs.context import Bits
from sparsedelta.errors import BaseMismatch, StructureMismatch
from sparsedelta.live import bits
from sparsedelta.live.held import Edit, Joined, Part, inside
from sparsedelta.live.ranks import merge
from sparsedelta.live.strides import Region, whole

if TYPE_CHECKING:
    import torch

_Found: TypeAlias = "tuple[slice | torch.Tensor, torch.Tensor]"


class Divided(Joined):
    """A tensor of which this rank holds parts.

    All ranks call ``gather``, ``read`` and ``blocks``, in the same order and inside ``Ranks.together``.

    Args:
        name: for messages.
        shape: shape of the whole tensor.
        parts: those that this rank holds; there may be none.
        dtype: of the tensor.
        device: where this rank has its parts.
        owner: an object that is the same for two tensors if they are the same memory, on all ranks or on none.
    """

    is_in_order = False

    def __init__(
        self,
        name: str,
        shape: tuple[int, ...],
        parts: Sequence[Part],
        dtype: torch.dtype,
        device: torch.device,
        owner: object,
    ) -> None:
        self.name = name
        self.shape = shape
        self.parts = parts
        self.dtype = dtype
        self.device = device
        self.owner = owner

    @property
    def regions(self) -> tuple[Region, ...]:
        """The flat indices of the elements that this rank holds."""
        return tuple(part.region for part in self.parts)

    def here(self, index: torch.Tensor) -> torch.Tensor:
        """Return which of the flat indices this rank holds, as a mask, ``(nnz,)``."""
        import torch

        found = torch.zeros(len(index), dtype=torch.bool, device=index.device)
        for part in self.parts:
            found[inside(part.region, index)[0]] = True
        return found

    def gather(self, index: torch.Tensor) -> torch.Tensor:
        """Return the bits at flat indices, which are the same on all ranks, as integers of the element size.

        Raises:
            BaseMismatch: ranks that hold the same elements have different values.
        """
        return self._merged(len(index), [_at(part, index) for part in self.parts])

    def own(self, index: torch.Tensor) -> torch.Tensor:
        """Return the bits at flat indices of elements that this rank holds; other ranks do nothing."""
        return self._own(len(index), [_at(part, index) for part in self.parts])

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` with the tensor's bytes from ``offset``, both whole elements; see ``gather``."""
        first, n = (one // self.dtype.itemsize for one in (offset, len(buffer)))
        held = bits.on_host(self.read(first, first + n))
        np.frombuffer(buffer, np.uint8)[:] = held.view(np.uint8)

    def read(self, start: int, end: int) -> torch.Tensor:
        """Return the bits of a range of elements; see ``gather``."""
        return self._merged(end - start, [self._in_range(part, start, end) for part in self.parts])

    def copied(self) -> torch.Tensor:
        """Raise an error: a rank does not hold the whole tensor.

        Raises:
            StructureMismatch: always.
        """
        raise StructureMismatch(
            f"tensor {self.name!r} is divided among ranks (DTensor), which this operation does not take; save"
            " the model and give the path of the saved checkpoint",
            tensor=self.name,
        )

    def blocks(self, n_elements: int, edit: Edit) -> Iterator[Bits]:
        """Yield the bits in host memory, in blocks; each rank edits the elements that it holds."""
        import torch

        for start in range(0, self.numel(), n_elements):
            end = min(start + n_elements, self.numel())
            held = [self._in_range(part, start, end) for part in self.parts]
            own = bits.on_host(self._own(end - start, held))
            yield self._checked(torch.from_numpy(edit(own, start)), held).numpy()

    def _in_range(self, part: Part, start: int, end: int) -> _Found:
        """Return the elements of a part in a range: their places in the range, and their bits."""
        import torch

        region = part.region
        if region.strides != whole(region.shape).strides or not part.tensor.is_contiguous():
            return _at(part, torch.arange(start, end, device=self.device))
        first = region.offset
        low, high = max(start, first), min(end, first + region.numel)
        if low >= high:
            low = high = first = start
        return slice(low - start, high - start), bits.flat_bits(part.tensor)[
            low - first : high - first
        ]

    def _merged(self, n: int, held: Sequence[_Found]) -> torch.Tensor:
        return self._checked(self._own(n, held), held)

    def _own(self, n: int, held: Sequence[_Found]) -> torch.Tensor:
        """Return n bits: those that this rank holds, and zeros."""
        import torch

        dtype = bits.integer_dtype(self.dtype.itemsize)
        found = torch.zeros(n, dtype=dtype, device=self.device)
        for at, values in held:
            found[at] = values.to(found.device)
        return found

    def _checked(self, own: torch.Tensor, held: Sequence[_Found]) -> torch.Tensor:
        """Return the bits of all ranks, after a check that those that this rank holds are the same on others."""
        import torch

        merged = merge(own)
        for at, _ in held:
            at = at if isinstance(at, slice) else at.to(own.device)
            if not torch.equal(own[at], merged[at]):
                raise BaseMismatch(
                    f"ranks that hold the same elements of tensor {self.name!r} have different values; load the"
                    " model again; nothing was written",
                    tensor=self.name,
                )
        return merged


def _at(part: Part, index: torch.Tensor) -> _Found:
    """Return the elements of a part at flat indices: which of these they are, and their bits."""
    at, inner = inside(part.region, index)
    return at, bits.gather(part.tensor, inner.to(part.tensor.device))


def divided(name: str, tensor: torch.Tensor) -> Divided | None:
    """Return what this rank holds of a tensor of a model; None if the tensor is not divided.

    Raises:
        StructureMismatch: the tensor is placed otherwise than in shards and replicas.
    """
    found = dtensor(tensor)
    if found is None:
        return None
    local = found._local_tensor.detach()
    box = _box(name, found)
    parts = [Part(box, local)] if box.numel else []
    owner = _owner(tensor, local)
    return Divided(name, tuple(found.shape), parts, local.dtype, local.device, owner)


def placed(name: str, tensor: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shape of the part of a DTensor that this rank holds, and where it begins in each direction.

    Raises:
        StructureMismatch: see ``divided``.
    """
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
    from torch.distributed.tensor.placement_types import _StridedShard

    mesh, placements = tensor.device_mesh, tensor.placements
    # FSDP2 over tensor parallelism: a shard of the rows that the other direction holds.
    if not all(isinstance(one, Shard | Replicate | _StridedShard) for one in placements):
        raise StructureMismatch(
            f"tensor {name!r} is placed as {placements}, expected shards or replicas", tensor=name
        )
    local, offset = compute_local_shape_and_global_offset(tuple(tensor.shape), mesh, placements)
    return tuple(local), tuple(offset)


def _box(name: str, tensor: Any) -> Region:
    """Return the flat indices in a DTensor of the elements that this rank holds, in order."""
    local, offset = placed(name, tensor)
    strides = whole(tuple(tensor.shape)).strides
    first = sum(start * step for start, step in zip(offset, strides, strict=True))
    return Region(local, int(first), strides)


def dtensor(tensor: torch.Tensor) -> Any:
    """Return a tensor if it is a DTensor, else None."""
    module = sys.modules.get("torch.distributed.tensor")
    return tensor if module is not None and isinstance(tensor, module.DTensor) else None


def _owner(tensor: torch.Tensor, local: torch.Tensor) -> object:
    """Return a parameter itself: an empty part has no memory to tell it by."""
    import torch

    if isinstance(tensor, torch.nn.Parameter) or not local.numel():
        return id(tensor)
    return local.device, local.data_ptr(), tuple(local.shape), local.stride()

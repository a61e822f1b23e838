"""Access by flat index to a checkpoint's tensor whose elements lie in tensors of a model.

Writes go to the model's memory. The functions also accept a plain tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from blake3 import blake3

from sparsedelta.codecs.context import Bits
from sparsedelta.format.records import DIGEST_BYTES
from sparsedelta.live import bits
from sparsedelta.live.strides import Region, whole

if TYPE_CHECKING:
    import torch


Edit: TypeAlias = Callable[[Bits, int], Bits]
_BLOCK_ELEMENTS = 1 << 22


@dataclass(frozen=True, slots=True)
class Part:
    """Some elements of a checkpoint's tensor.

    Attributes:
        region: their flat indices in the checkpoint's tensor.
        tensor: a view of the model's memory with the region's shape.
    """

    region: Region
    tensor: torch.Tensor


class Joined:
    """A checkpoint's tensor whose elements lie in parts in a model.

    Args:
        shape: shape of the checkpoint's tensor.
        parts: all of its elements, each once; all parts have one dtype.
    """

    is_meta = False

    def __init__(self, shape: tuple[int, ...], parts: Sequence[Part]) -> None:
        self.shape = shape
        self.parts = parts
        self.dtype: torch.dtype = parts[0].tensor.dtype
        self.device: torch.device = parts[0].tensor.device

    def numel(self) -> int:
        """Return the number of elements."""
        return math.prod(self.shape)

    def gather(self, index: torch.Tensor) -> torch.Tensor:
        """Return the bits at flat indices as integers of the element size, ``(nnz,)``."""
        import torch

        if self.is_in_order:
            return bits.gather(self.parts[0].tensor, index)
        width = self.parts[0].tensor.element_size()
        found = torch.empty(len(index), dtype=bits.integer_dtype(width), device=index.device)
        for part in self.parts:
            at, inner = inside(part.region, index)
            there = bits.gather(part.tensor, inner.to(part.tensor.device))
            found[at] = there.to(found.device)
        return found

    def scatter(self, index: torch.Tensor, values: torch.Tensor) -> None:
        """Write bits at flat indices, in place."""
        if self.is_in_order:
            bits.scatter(self.parts[0].tensor, index, values)
            return
        for part in self.parts:
            at, inner = inside(part.region, index)
            device = part.tensor.device
            bits.scatter(part.tensor, inner.to(device), values[at].to(device))

    def copied(self) -> torch.Tensor:
        """Return a contiguous copy with the checkpoint's shape."""
        import torch

        copy = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        memory = bits.flat_bits(copy)
        for part in self.parts:
            region = part.region
            place = torch.as_strided(memory, region.shape, region.strides, region.offset)
            place.copy_(bits.integer_view(part.tensor))
        return copy

    def blocks(self, n_elements: int, edit: Edit) -> Iterator[Bits]:
        """Yield the bits in host memory, in blocks, each valid until the next one is requested.

        Args:
            n_elements: in a block.
            edit: returns what takes the place of a block, from it and the flat index of its first element.
        """
        yield from _edited(bits.flat_bits(self.copied()), n_elements, edit)

    @property
    def is_in_order(self) -> bool:
        """Whether a single part has all elements in row-major order."""
        region = self.parts[0].region
        return len(self.parts) == 1 and region == whole(region.shape)


Held: TypeAlias = "torch.Tensor | Joined"


def parts_of(held: Held) -> list[torch.Tensor]:
    """Return the tensors of the model, or views of them, that hold the elements."""
    return [part.tensor for part in held.parts] if isinstance(held, Joined) else [held]


def memory_in_order(held: Held) -> torch.Tensor | None:
    """Return the tensor of the model whose memory has the elements in row-major order; None if there is none."""
    if isinstance(held, Joined):
        if not held.is_in_order:
            return None
        held = held.parts[0].tensor
    return held if held.is_contiguous() else None


def gather(held: Held, index: torch.Tensor) -> torch.Tensor:
    """Return the bits at flat indices as integers of the element size, ``(nnz,)``."""
    return held.gather(index) if isinstance(held, Joined) else bits.gather(held, index)


def scatter(held: Held, index: torch.Tensor, values: torch.Tensor) -> None:
    """Write bits at flat indices, in place."""
    if isinstance(held, Joined):
        held.scatter(index, values)
    else:
        bits.scatter(held, index, values)


def assign(held: Held, flat: torch.Tensor) -> None:
    """Write all elements, in place.

    Args:
        held: the tensor.
        flat: its new bits as integers of the element size, in row-major order, ``(numel,)``.
    """
    import torch

    if isinstance(held, Joined):
        for part in held.parts:
            region = part.region
            values = torch.as_strided(flat, region.shape, region.strides, region.offset)
            bits.integer_view(part.tensor).copy_(values)
    else:
        bits.integer_view(held).copy_(flat.view(held.shape))


def in_order(held: Held) -> torch.Tensor:
    """Return the elements as a contiguous tensor: the model's memory if it has them in row-major order, else a copy."""
    import torch

    if isinstance(held, Joined):
        return held.copied()
    if held.is_contiguous():
        return held.detach()
    copy = torch.empty(held.shape, dtype=held.dtype, device=held.device)
    bits.integer_view(copy).copy_(bits.integer_view(held))  # a copy of floats may change NaNs
    return copy


def whole_digest(held: Held) -> bytes:
    """Return the digest of all elements. From a GPU, every byte is copied to the host once."""
    return _digest(held, lambda block, start: block)


def changed_digest(held: Held, index: torch.Tensor, values: torch.Tensor) -> bytes:
    """Return the digest that all elements would have with other bits at flat indices; see ``scatter``.

    Args:
        held: the tensor; it is not changed.
        index: increasing, (nnz,).
        values: the bits, (nnz,).
    """
    where, new = bits.on_host(index), bits.on_host(values)

    def edit(block: Bits, start: int) -> Bits:
        low, high = np.searchsorted(where, [start, start + len(block)]).tolist()
        if low < high:
            block = block.copy()  # it may be the model's memory
            block[where[low:high] - start] = new[low:high]
        return block

    return _digest(held, edit)


def _digest(held: Held, edit: Edit) -> bytes:
    hasher = blake3()
    blocks = (
        held.blocks(_BLOCK_ELEMENTS, edit)
        if isinstance(held, Joined)
        else _edited(bits.flat_bits(in_order(held)), _BLOCK_ELEMENTS, edit)
    )
    for block in blocks:
        hasher.update(block.view(np.uint8).data)
    return hasher.digest()[:DIGEST_BYTES]


def _edited(flat: torch.Tensor, n_elements: int, edit: Edit) -> Iterator[Bits]:
    start = 0
    for block in bits.blocks_on_host(flat, n_elements):
        yield edit(block, start)
        start += len(block)


def inside(region: Region, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return which of the indices lie in a region, as positions ``(n,)``, and their indices in the region ``(n,)``."""
    import torch

    rest = index.long() - region.offset
    if region.strides == whole(region.shape).strides:  # the elements are a range
        at = ((rest >= 0) & (rest < region.numel)).nonzero().view(-1)
        return at, rest[at]
    inner = torch.zeros_like(rest)
    is_in = rest >= 0
    for size, step in zip(region.shape, region.strides, strict=True):
        digit = rest // step
        is_in &= digit < size
        inner = inner * size + digit
        rest = rest - digit * step
    is_in &= rest == 0
    at = is_in.nonzero().view(-1)
    return at, inner[at]

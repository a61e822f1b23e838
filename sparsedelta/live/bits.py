"""The bits of torch tensors: torch dtypes by wire dtype, and access to elements by flat index.

All access goes through integer views that share the tensor's memory. Nothing is computed in floating point.
"""

from __future__ import annotations

import ctypes
import errno
import math
import os
from collections.abc import Iterator, Sequence
from functools import lru_cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

from sparsedelta.codecs.context import Bits
from sparsedelta.dtypes import DType
from sparsedelta.tensors.start import Readable

if TYPE_CHECKING:
    import torch

# safetensors sorts the tensors of a file by dtype, in the reverse of this order.
_TORCH_NAMES = {
    "BOOL": "bool",
    "F4": "float4_e2m1fn_x2",
    "U8": "uint8",
    "I8": "int8",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "C64": "complex64",
    "F64": "float64",
    "I64": "int64",
    "U64": "uint64",
}
SAVED_DTYPES = tuple(_TORCH_NAMES)


def check_installed(*packages: str) -> None:
    """Check that packages are installed.

    Raises:
        ModuleNotFoundError: some are not; the message names all of them.
    """
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        others = [package for package in missing if package not in ("torch", "transformers")]
        wanted = ["'sparsedelta[train]'"] if missing != others else []
        are, them = ("is", "it") if len(missing) == 1 else ("are", "them")
        raise ModuleNotFoundError(
            f"models in memory need {' and '.join(missing)}, which {are} not installed; install {them} with:"
            f" pip install {' '.join([*wanted, *others])}",
            name=missing[0],
        )


def torch_dtype(dtype: DType) -> torch.dtype | None:
    """Return the torch dtype of a wire dtype; None if torch has none."""
    import torch

    found = getattr(torch, _TORCH_NAMES.get(dtype.name, ""), None)
    return found if isinstance(found, torch.dtype) else None


def wire_name(dtype: torch.dtype) -> str:
    """Return the wire name of a torch dtype; torch's own name if it has none."""
    name = str(dtype).removeprefix("torch.")
    return next((wire for wire, own in _TORCH_NAMES.items() if own == name), name)


def shape_in_file(dtype: torch.dtype, shape: Sequence[int]) -> tuple[int, ...]:
    """Return the shape that a file states for a tensor; torch counts two 4-bit values as one element."""
    if wire_name(dtype) == "F4" and shape:
        return (*shape[:-1], 2 * shape[-1])
    return tuple(shape)


def shape_in_torch(dtype: torch.dtype, shape: Sequence[int]) -> tuple[int, ...]:
    """Return the shape that torch gives a tensor of a file."""
    if wire_name(dtype) == "F4" and shape:
        return (*shape[:-1], shape[-1] // 2)
    return tuple(shape)


@lru_cache
def integer_dtype(width: int) -> torch.dtype:
    """Return the signed integer dtype of ``width`` bytes; torch supports few operations on unsigned ones."""
    import torch

    return {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[width]


def integer_view(tensor: torch.Tensor) -> torch.Tensor:
    """Return a view of a tensor as signed integers of the element size, with the same shape."""
    return tensor.detach().view(integer_dtype(tensor.element_size()))


def flat_bits(tensor: torch.Tensor) -> torch.Tensor:
    """Return a flat integer view of a contiguous tensor, ``(numel,)``."""
    return integer_view(tensor).view(-1)


def gather(tensor: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Return the bits at flat indices as integers of the element size, ``(nnz,)``."""
    memory, offsets = _memory(tensor, index)
    return memory.index_select(0, offsets)


def on_host(tensor: torch.Tensor) -> Bits:
    """Return the elements of an integer tensor in host memory: its own memory if it is there, else a copy.

    From a GPU, the copy is in pinned memory, which is filled many times faster than other memory.
    """
    if not tensor.is_cuda:
        return tensor.cpu().numpy()
    import torch

    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor).numpy()


def blocks_on_host(flat: torch.Tensor, n_elements: int) -> Iterator[Bits]:
    """Yield a flat integer tensor in blocks, each valid until the next one is requested.

    From a GPU, the next block is copied while the caller uses one, in two blocks of pinned memory.
    """
    if not flat.is_cuda:
        for block in flat.split(n_elements):
            yield on_host(block)
        return
    import torch

    stream = torch.cuda.Stream(flat.device)
    stream.wait_stream(torch.cuda.current_stream(flat.device))
    n_most = min(n_elements, len(flat))
    hosts = [torch.empty(n_most, dtype=flat.dtype, pin_memory=True) for _ in range(2)]
    copied = [torch.cuda.Event() for _ in range(2)]
    blocks = flat.split(n_elements)

    def start(number: int) -> None:
        if number < len(blocks):
            with torch.cuda.stream(stream):
                block = blocks[number]
                hosts[number % 2][: len(block)].copy_(block, non_blocking=True)
                copied[number % 2].record(stream)

    start(0)
    for number, block in enumerate(blocks):
        start(number + 1)
        copied[number % 2].synchronize()
        yield hosts[number % 2][: len(block)].numpy()


def blocks_on_device(
    flat: torch.Tensor, n_elements: int, device: torch.device
) -> Iterator[torch.Tensor]:
    """Yield a flat integer tensor in blocks on a device, each valid until the next one is requested.

    From pinned memory to a GPU, the next block is copied while the caller uses one.
    """
    blocks = flat.split(n_elements)
    if device.type != "cuda" or flat.device == device:
        yield from (block.to(device) for block in blocks)
        return
    import torch

    stream = torch.cuda.Stream(device)
    copies: list[torch.Tensor] = []

    def start(number: int) -> None:
        if number < len(blocks):
            stream.wait_stream(
                torch.cuda.current_stream(device)
            )  # has used the memory that is reused
            with torch.cuda.stream(stream):
                copies.append(blocks[number].to(device, non_blocking=True))

    start(0)
    for number in range(len(blocks)):
        torch.cuda.current_stream(device).wait_stream(stream)
        block = copies.pop()
        block.record_stream(torch.cuda.current_stream(device))
        start(number + 1)
        yield block


class TensorBytes:
    """The bytes of a tensor on any device, in row-major order; implements ``tensors.start.Readable``."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor
        # Operations of torch would take much of the time of small reads, and other threads would wait for them.
        self._bytes: Bits | None = None
        if tensor.device.type == "cpu" and tensor.is_contiguous():
            self._bytes = flat_bits(tensor).numpy().view(np.uint8)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` with the bytes from ``offset``; both must be multiples of the element size."""
        import torch

        if self._bytes is not None:
            np.frombuffer(buffer, np.uint8)[:] = self._bytes[offset : offset + len(buffer)]
            return
        tensor = self._tensor
        width = tensor.element_size()
        first, end = offset // width, (offset + len(buffer)) // width
        if tensor.is_contiguous():
            part = flat_bits(tensor)[first:end]
        else:
            part = gather(tensor, torch.arange(first, end, device=tensor.device))
        np.frombuffer(buffer, np.uint8)[:] = on_host(part).view(np.uint8)


class Overlay:
    """The bytes of a tensor with other bits at some elements (``tensors.start.Readable``).

    Args:
        tensor: without them.
        index: which elements, increasing.
        bits: theirs.
    """

    def __init__(
        self, tensor: Readable, index: np.ndarray[tuple[int], np.dtype[Any]], bits: Bits
    ) -> None:
        self._tensor = tensor
        self._index = index
        self._bits = bits

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` with bytes from ``offset``; both are whole elements."""
        self._tensor.read_into(buffer, offset)
        bits = np.frombuffer(buffer, self._bits.dtype)
        first = offset // bits.itemsize
        edges = np.array([first, first + len(bits)])
        if edges[1] <= np.iinfo(self._index.dtype).max:  # else searchsorted copies the index
            edges = edges.astype(self._index.dtype)
        low, high = np.searchsorted(self._index, edges).tolist()
        bits[self._index[low:high] - first] = self._bits[low:high]

    def at(self, index: np.ndarray[tuple[int], np.dtype[np.int64]], bits: Bits) -> Bits:
        """Return the bits at elements, ``bits`` being those of the tensor without the others."""
        if not len(self._index):
            return bits
        places = np.minimum(np.searchsorted(self._index, index), len(self._index) - 1)
        return np.where(self._index[places] == index, self._bits[places], bits)


def scatter(tensor: torch.Tensor, index: torch.Tensor, bits: torch.Tensor) -> None:
    """Write ``bits`` at flat indices, in place."""
    memory, offsets = _memory(tensor, index)
    memory.scatter_(0, offsets.long(), bits)


def _memory(tensor: torch.Tensor, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a flat view of a tensor's memory, and the offsets in it of the elements at flat indices."""
    import torch

    if tensor.is_contiguous():
        return flat_bits(tensor), index
    view, index = integer_view(tensor), index.long()
    extent = 1 + sum(
        (size - 1) * step for size, step in zip(view.shape, view.stride(), strict=True)
    )
    memory = torch.as_strided(view, (extent,), (1,))
    offsets = torch.zeros_like(index)
    for size, step in zip(reversed(view.shape), reversed(view.stride()), strict=True):
        offsets += index % size * step
        index = index // size
    return memory, offsets


def overlaps_itself(tensor: torch.Tensor) -> bool:
    """Return whether elements of a tensor may share memory, as in an expanded tensor."""
    strides = sorted(
        (step, size) for size, step in zip(tensor.shape, tensor.stride(), strict=True) if size > 1
    )
    extent = 1
    for step, size in strides:
        if step < extent:
            return math.prod(tensor.shape) > 1
        extent = step * size
    return False


def is_read_only(tensor: torch.Tensor) -> bool:
    """Return whether a tensor's memory is read-only, such as that of a file mapped for reading.

    Torch does not record this, and a write would crash the process. This function therefore lets the kernel
    write the first byte over itself, with ``readv`` from a pipe, which fails with EFAULT on read-only memory.
    """
    if tensor.device.type != "cpu" or not tensor.numel() or not hasattr(os, "readv"):
        return False
    first = (ctypes.c_char * 1).from_address(tensor.data_ptr())
    reading, writing = os.pipe()
    try:
        os.write(writing, bytes(first))
        os.readv(reading, [first])
    except OSError as error:
        if error.errno == errno.EFAULT:
            return True
        raise
    finally:
        os.close(reading)
        os.close(writing)
    return False

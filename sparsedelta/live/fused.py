"""Work on a GPU in few launches: finding what has changed, and writing to many tensors.

Each launch and each pass over memory costs time. The kernels (``triton_kernels``) compare two tensors in one pass,
and write to all tensors of a model in one launch. Without Triton, operations of torch do the same.
"""

from __future__ import annotations

import logging
import math
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_logger = logging.getLogger(__name__)
_BLOCK = 1 << 11  # elements that a group of threads handles


@dataclass(frozen=True, slots=True)
class Write:
    """Elements to be written to one tensor, all on one GPU.

    Attributes:
        tensor: the tensor, contiguous.
        index: flat indices, different from each other, (nnz,) int32 or int64.
        values: bits, (nnz,) integers of the element size.
    """

    tensor: torch.Tensor
    index: torch.Tensor
    values: torch.Tensor


def kernels_for(device: torch.device) -> Any:
    """Return the module of kernels; None if they cannot run on a device, or if they are turned off."""
    if device.type != "cuda" or os.environ.get("SPARSEDELTA_KERNELS") == "numpy":
        return None
    return _working_kernels(device)


@lru_cache
def _working_kernels(device: torch.device) -> Any:
    """Return the module of kernels if it gives right results on a device, else None."""
    import torch

    try:
        from sparsedelta.live import triton_kernels

        now = torch.arange(3 * _BLOCK + 5, device=device).to(torch.int16)
        expected = torch.tensor([0, 7, _BLOCK, 3 * _BLOCK + 4], device=device)
        before = now.clone()
        before[expected] += 1
        index, values = _changed_fused(triton_kernels, before, now)
        Writes([Write(before, index, values)], triton_kernels).run()
        works = torch.equal(index.long(), expected) and torch.equal(before, now)
    except ImportError as error:
        _logger.debug("no kernels for %s, torch does their work: %s", device, error)
        return None
    except (
        Exception
    ) as error:  # no compiler for the device, another version of Triton or of the driver
        _logger.warning("the kernels do not run on %s, torch does their work: %s", device, error)
        return None
    if not works:
        _logger.warning("the kernels give wrong results on %s, torch does their work", device)
        return None
    return triton_kernels


def changed(before: torch.Tensor, now: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return which elements of two flat integer tensors differ, and their values now.

    Args:
        before: (n,), n at most 2^31.
        now: (n,), of the same dtype and on the same device.

    Returns:
        The numbers of the elements, increasing, (nnz,) int32, and the values, (nnz,).
    """
    import torch

    kernels = kernels_for(now.device)
    if kernels and len(now):
        return _changed_fused(kernels, before, now)
    index = torch.nonzero(now != before).view(-1)
    return index.int(), now.index_select(0, index)


def _changed_fused(
    kernels: Any, before: torch.Tensor, now: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    n, device = len(now), now.device
    n_blocks = -(-n // _BLOCK)
    words = torch.empty(n_blocks * _BLOCK // 32, dtype=torch.int32, device=device)
    counts = torch.empty(n_blocks, dtype=torch.int32, device=device)
    kernels.compare[(n_blocks,)](before, now, n, words, counts, n_block=_BLOCK)
    ends = counts.cumsum(0)
    n_changed = int(ends[-1])  # waits for the device
    index = torch.empty(n_changed, dtype=torch.int32, device=device)
    values = torch.empty(n_changed, dtype=now.dtype, device=device)
    if n_changed:
        kernels.collect[(n_blocks,)](now, words, ends - counts, index, values, n_block=_BLOCK)
    return index, values


class Writes:
    """Writes to many tensors, in one launch for each size of elements. It may run many times.

    Args:
        writes: no two of them write to the same memory.
        kernels: what ``kernels_for`` returned.
    """

    def __init__(self, writes: Sequence[Write], kernels: Any) -> None:
        groups: dict[tuple[int, int], list[Write]] = defaultdict(list)
        for write in writes:
            if write.index.numel():
                groups[write.values.element_size(), write.index.element_size()].append(write)
        self._writes = writes  # keeps the memory that the tables refer to
        self._kernels = kernels
        self._tables = [(key, len(group), *_table(group)) for key, group in groups.items()]

    def run(self) -> None:
        """Write all elements."""
        kernels = self._kernels
        for (width, index_width), n_tensors, table, n_blocks in self._tables:
            kernels.scatter[(n_blocks,)](
                table,
                n_tensors,
                element=kernels.INTEGERS[width],
                integer=kernels.INTEGERS[index_width],
                n_steps=math.ceil(math.log2(n_tensors)),
                n_block=_BLOCK,
            )


def _table(group: Sequence[Write]) -> tuple[torch.Tensor, int]:
    """Return the table of ``triton_kernels.scatter``, and the number of blocks."""
    import torch

    rows, n_blocks = [], 0
    for one in group:
        n = one.index.numel()
        pointers = (part.data_ptr() for part in (one.tensor, one.index, one.values))
        rows.append((n_blocks, n, *pointers))
        n_blocks += -(-n // _BLOCK)
    return torch.tensor(rows, dtype=torch.int64).to(group[0].index.device), n_blocks

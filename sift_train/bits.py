"""The bits of tensors as integers, for comparisons that are exact also for NaN and -0.0, and the changes where they differ."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_DTYPES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits_of(tensor: Tensor) -> Tensor:
    """Return a tensor's elements as integers of their size; a view if the tensor is contiguous."""
    return tensor.contiguous().view(_DTYPES[tensor.element_size()])


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Return whether two tensors have the same bits."""
    return torch.equal(left.view(torch.uint8), right.view(torch.uint8))


def equal_bits(left: Tensor, right: Tensor) -> Tensor:
    """Return where two tensors have the same bits, as a bool tensor."""
    return bits_of(left) == bits_of(right)


def mean_change(before: Tensor, after: Tensor) -> float | None:
    """Return the mean |change| of the elements whose bits changed.

    None if there is none, the mean is not finite, or the tensors have other shapes or dtypes than each
    other, or an integer dtype.
    """
    is_comparable = before.dtype == after.dtype and before.shape == after.shape
    if not is_comparable or not before.is_floating_point() or before.itemsize < 2:
        return None
    distances = moved(before, after)
    mean = float(distances.mean()) if len(distances) else math.nan
    return mean if math.isfinite(mean) else None


def moved(before: Tensor, after: Tensor) -> Tensor:
    """Return |change| in fp64 of the elements whose bits changed; both tensors have one float dtype and shape."""
    changed = ~equal_bits(before, after)
    return (after[changed].double() - before[changed].double()).abs()

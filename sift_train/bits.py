"""The bits of tensors as integers, for comparisons that are exact also for NaN and -0.0, and the changes where they differ."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

SLICE = 1 << 20  # elements that are compared at a time, so that temporary tensors stay small
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
    flat = before.reshape(-1), after.reshape(-1)
    parts = zip(*(one.split(SLICE) for one in flat), strict=True)
    return mean_of(sums_of_changes(parts))


def sums_of_changes(parts: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the sum of |change| of the elements whose bits changed, and their number, as fp64 of shape (2,).

    Args:
        parts: values before and after; both of a pair have one float dtype and shape.
    """
    sums = torch.zeros(2, dtype=torch.float64)
    for before, after in parts:
        changed = ~equal_bits(before, after)
        distances = (after[changed].double() - before[changed].double()).abs()
        sums += torch.tensor([float(distances.sum()), len(distances)], dtype=sums.dtype)
    return sums


def mean_of(sums: Tensor) -> float | None:
    """Return the mean of what ``sums_of_changes`` has added; None if it is not finite, or nothing changed."""
    mean = float(sums[0] / sums[1])
    return mean if math.isfinite(mean) else None

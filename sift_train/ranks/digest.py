"""Compares tensors over all ranks by checksums, without sending the tensors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sift_train.bits import bits_of
from sift_train.ranks.group import Ranks
from sift_train.selection import slices_of

_ODD = 0x9E3779B97F4A7C15 - (1 << 64)  # 2**64 divided by the golden ratio, as a signed number


def checksum(tensor: Tensor) -> Tensor:
    """Return a checksum of a tensor's bits and their order: an int64 scalar on its device.

    The sum of bits times odd numbers that depend on the position, modulo 2**64. So any change of a
    single element changes it.
    """
    flat = tensor.detach().reshape(-1)
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    start = 0
    for part in slices_of(flat):
        bits = bits_of(part).long()
        place = torch.arange(start, start + len(bits), device=flat.device)
        total += (bits * (place * _ODD).bitwise_xor(place >> 7).bitwise_or(1)).sum()
        start += len(bits)
    return total


def first_difference(tensors: Mapping[str, Tensor], ranks: Ranks) -> str | None:
    """Return the name of the first tensor that differs between ranks in bits or size, None if none.

    Args:
        tensors: the same names in the same order on all ranks; the number of names may differ.
        ranks: the ranks.
    """
    if ranks.size == 1:
        return None
    low, high = ranks.extremes(torch.tensor([len(tensors)]))
    if not torch.equal(low, high):
        return "the number of tensors"
    if not tensors:
        return None
    sums = [checksum(tensor).cpu() for tensor in tensors.values()]
    sizes = [torch.tensor(tensor.numel()) for tensor in tensors.values()]
    low, high = ranks.extremes(torch.stack([*sums, *sizes]))
    differs = (low != high).view(2, -1).any(0).tolist()
    return next((name for name, bad in zip(tensors, differs, strict=True) if bad), None)

"""Checks that all ranks read the same micro-batches, which ``fit`` then divides among them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sift_train.ranks.digest import checksum
from sift_train.ranks.group import Ranks


def check_same_batches(batches: Sequence[Any], ranks: Ranks) -> None:
    """Compare the tensors in micro-batches over all ranks.

    Raises:
        ValueError: they differ.
    """
    if ranks.size == 1:
        return
    total = torch.zeros((), dtype=torch.int64)
    for number, tensor in enumerate(_tensors(batches)):
        total += (2 * number + 1) * checksum(tensor).cpu()
    low, high = ranks.extremes(torch.stack([total, torch.tensor(len(batches))]))
    if not torch.equal(low, high):
        raise ValueError(
            "the ranks read different micro-batches; give every rank the same data in the same order,"
            " without a DistributedSampler, and fit divides the micro-batches among the ranks"
        )


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.numel() and not value.is_complex():
            yield value.view(torch.uint8) if value.dtype == torch.bool else value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _tensors(each)
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        for each in value:
            yield from _tensors(each)

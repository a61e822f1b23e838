"""Clips the gradients of masters by their norm over all shards."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from sift_train.masters import SparseParameter
from sift_train.ranks.shard import Shard


def clip_shards(parts: Iterable[SparseParameter], max_norm: float) -> Tensor:
    """Clip the gradient of all parts to a norm; return its norm before, over all shards.

    Args:
        parts: the same on all ranks; those that are not sharded have the same gradient on all.
        max_norm: the largest norm that is kept.
    """
    squares: dict[Any, Tensor] = defaultdict(lambda: torch.zeros(()))  # by the groups of the shards
    shards: dict[Any, Shard] = {}
    gradients = []
    for part in parts:
        groups: Any = () if part.shard is None else part.shard.groups
        if part.shard is not None:
            shards[groups] = part.shard
        squares[groups] = squares[groups].to(part.master.device)
        if part.pending_gradient is not None:
            gradients.append(part.pending_gradient)
            squares[groups] = squares[groups] + gradients[-1].square().sum()
    for groups, shard in shards.items():
        shard.sum_(squares[groups])
    norm = torch.as_tensor(sum(squares.values())).sqrt()
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(factor.to(gradient))
    return norm

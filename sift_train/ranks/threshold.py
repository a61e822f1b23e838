"""Finds the k largest scores over the shards of tensors, without gathering scores.

The ranks add up counts of the scores' bits: twice 65,536 numbers for each search. The result is that of
``selection.top_k_of_all`` on the whole tensors, if the shards are consecutive rows; otherwise
another seeded draw decides among equal scores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from sift_train.ranks.shard import Shard
from sift_train.selection import index_dtype, non_finite_lowest, slices_of

_N_BINS = 1 << 16
_HALF = 1 << 15


def top_k_of_shards(
    scores: Mapping[str, Tensor],
    k: int,
    generator: torch.Generator,
    shards: Mapping[str, Shard],
) -> dict[str, Tensor]:
    """Return, for each tensor, the flat indices in this rank's shard of the k largest of all scores.

    Args:
        scores: of this rank's shard of each tensor, the same names in the same order on all ranks.
        k: number of components over all tensors and shards.
        generator: in the same state on all ranks; it decides among equal scores.
        shards: where the shards lie; all must have the same parts.

    Raises:
        ValueError: the tensors are sharded over different ranks.
    """
    first = next(iter(shards.values()))
    if any(shard.groups != first.groups for shard in shards.values()):
        raise ValueError("the tensors are sharded over different ranks; choose budget='tensor'")
    flat = [each.detach().reshape(-1) for each in scores.values()]
    if not k:
        return {name: torch.empty(0, dtype=torch.int32) for name in scores}
    least, n_missing, n_ties = _kth_largest(flat, k, first.sum_)
    ties = torch.zeros(len(flat), first.n_parts, dtype=torch.int64)
    for row, each in zip(ties, flat, strict=True):
        row[first.number] = sum(int((keys == least).sum()) for keys in _keys(each))
    first.sum_(ties)
    before = (ties.view(-1).cumsum(0).view_as(ties) - ties)[:, first.number]
    is_taken = torch.zeros(n_ties + 1, dtype=torch.bool)
    is_taken[torch.randperm(n_ties, generator=generator)[:n_missing] + 1] = True
    return {
        name: _above_or_taken(each, least, is_taken, int(start))
        for name, each, start in zip(scores, flat, before, strict=True)
    }


def _kth_largest(
    flat: list[Tensor], k: int, add_up: Callable[[Tensor], Tensor]
) -> tuple[int, int, int]:
    """Return the key of the k-th largest score, how many equal to it are needed, and how many exist."""
    counts = torch.zeros(_N_BINS, dtype=torch.int64)
    for keys in _all_keys(flat):
        counts += torch.bincount((keys >> 16) + _HALF, minlength=_N_BINS).cpu()
    high, nth, _ = _find(add_up(counts), k)
    counts = torch.zeros(_N_BINS, dtype=torch.int64)
    for keys in _all_keys(flat):
        inside = keys[(keys >> 16) + _HALF == high]
        counts += torch.bincount(inside & (_N_BINS - 1), minlength=_N_BINS).cpu()
    low, nth, n_ties = _find(add_up(counts), nth)
    return ((high - _HALF) << 16) + low, nth, n_ties


def _find(counts: Tensor, nth: int) -> tuple[int, int, int]:
    """Return the bin of the n-th largest item, its rank in that bin, and the bin's count."""
    down_to = counts.flip(0).cumsum(0)
    at = int(torch.searchsorted(down_to, nth))
    here = int(counts[_N_BINS - 1 - at])
    return _N_BINS - 1 - at, nth - int(down_to[at]) + here, here


def _all_keys(flat: list[Tensor]) -> Iterator[Tensor]:
    for each in flat:
        yield from _keys(each)


def _keys(flat: Tensor) -> Iterator[Tensor]:
    """Yield integers that are ordered as the scores in fp32; non-finite scores are the lowest."""
    for part in slices_of(flat) if len(flat) else ():
        bits = non_finite_lowest(part).float().add(0.0).view(torch.int32)  # -0.0 + 0.0 is 0.0
        yield torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()


def _above_or_taken(flat: Tensor, least: int, is_taken: Tensor, n_before: int) -> Tensor:
    found = []
    start = 0
    for keys in _keys(flat):
        ties = keys == least
        rank = ties.cumsum(0) + n_before
        chosen = (keys > least) | (ties & is_taken.to(keys.device)[rank])
        found.append(chosen.nonzero().flatten() + start)
        n_before, start = int(rank[-1]), start + len(keys)
    dtype = index_dtype(len(flat))
    return torch.cat(found).to(dtype) if found else torch.empty(0, dtype=dtype, device=flat.device)

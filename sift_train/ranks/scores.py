"""Sums the scores of components over all ranks, one tensor at a time and in slices."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from sift_train.masters import SparseParameter
from sift_train.ranks.group import Ranks
from sift_train.ranks.threshold import top_k_of_shards
from sift_train.scores import GradientScores
from sift_train.selection import DEVICE_SLICE, top_k_of_all


def share_scores(
    scores: dict[str, GradientScores],
    parts: Iterable[SparseParameter],
    ranks: Ranks,
    new_scores: Callable[[], GradientScores],
) -> dict[str, GradientScores]:
    """Return the scores summed over all ranks, in the order of the parts, the same on all ranks.

    Args:
        scores: the scores of this rank by the part's name, on the CPU; they are edited in place.
        parts: all parts in the same order on all ranks; those already chosen are the same, too.
        ranks: the ranks.
        new_scores: makes the scores of a part that has no gradient on this rank.
    """
    waiting = [part for part in parts if not part.is_selected or part.name in scores]
    chosen = {part.name: scores[part.name] for part in waiting if part.is_selected}
    waiting = [part for part in waiting if not part.is_selected]
    return {**chosen, **sum_scores(scores, waiting, ranks, new_scores)}


def sum_scores(
    scores: Mapping[str, GradientScores],
    waiting: Iterable[SparseParameter],
    ranks: Ranks,
    new_scores: Callable[[], GradientScores],
) -> dict[str, GradientScores]:
    """Return the scores of those parts that have any on some rank, summed over all ranks.

    Args:
        scores: as for ``share_scores``.
        waiting: the parts, the same in the same order on all ranks.
        ranks: the ranks.
        new_scores: as for ``share_scores``.
    """
    waiting = list(waiting)
    summed: dict[str, GradientScores] = {}
    if not waiting:
        return summed
    counts = torch.tensor([float(part.name in scores) for part in waiting])
    for part, count in zip(waiting, ranks.sum_(counts).tolist(), strict=True):
        if not count:
            continue
        own = scores.get(part.name)
        if own is None:
            own = new_scores()
            own.fill_with_zeros(part.local)
        summed[part.name] = own
        if part.shard is not None:
            continue  # its gradients have been summed over the ranks already
        for piece in own.total.view(-1).split(DEVICE_SLICE):
            ranks.sum_(piece)
        own.n_ranks = ranks.size
    return summed


def has_scores(parts: Sequence[SparseParameter], scores: Sequence[GradientScores]) -> bool:
    """Return whether any component of the parts has a score other than 0, also on other shards."""
    has_own = any(score.has_scores for score in scores)
    shards = {part.shard.groups: part.shard for part in parts if part.shard is not None}
    if not shards:
        return has_own
    found = torch.tensor(float(has_own))
    for shard in shards.values():
        shard.sum_(found)
    return bool(found)


def largest_of_all(
    parts: Mapping[str, SparseParameter],
    scores: Mapping[str, Tensor],
    k: int,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Return the flat indices of the k largest scores of all parts, in this rank's shards.

    Raises:
        ValueError: some parts are sharded and others are not.
    """
    shards = {name: parts[name].shard for name in scores}
    own = {name: shard for name, shard in shards.items() if shard is not None}
    if not own:
        return top_k_of_all(scores, k, generator)
    if len(own) < len(shards):
        name = next(name for name in shards if name not in own)
        raise ValueError(
            f"parameter {name!r} is not sharded but others are; choose budget='tensor', or shard all"
        )
    return top_k_of_shards(scores, k, generator, own)


def count_over_shards(parts: Iterable[SparseParameter]) -> None:
    """Set the number of components of sharded parts to the number that the shards have chosen."""
    for part in parts:
        if part.shard is not None:
            part.n_wanted = int(part.shard.sum_(torch.tensor(part.train_num)))

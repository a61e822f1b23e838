"""Sums the scores of components over all ranks, one tensor at a time and in slices."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from sift_train.masters import SparseParameter
from sift_train.ranks.group import Ranks
from sift_train.scores import GradientScores
from sift_train.selection import DEVICE_SLICE


def share_scores(
    scores: dict[str, GradientScores],
    parts: Iterable[SparseParameter],
    ranks: Ranks,
) -> dict[str, GradientScores]:
    """Return the scores summed over all ranks, in the order of the parts, the same on all ranks.

    Args:
        scores: the scores of this rank by the part's name, on the CPU; they are edited in place.
        parts: all parts in the same order on all ranks; those already chosen are the same, too.
        ranks: the ranks.
    """
    waiting = [part for part in parts if not part.is_selected or part.name in scores]
    chosen = {part.name: scores[part.name] for part in waiting if part.is_selected}
    waiting = [part for part in waiting if not part.is_selected]
    if not waiting:
        return chosen
    counts = torch.tensor([float(part.name in scores) for part in waiting])
    for part, count in zip(waiting, ranks.sum_(counts).tolist(), strict=True):
        if not count:
            continue
        own = scores.get(part.name) or GradientScores.empty(part.parameter)
        for piece in own.total.view(-1).split(DEVICE_SLICE):
            ranks.sum_(piece)
        chosen[part.name] = own
    return chosen

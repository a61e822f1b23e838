"""Moves the choice of components during a training: drops some trained ones and grows as many others.

The number of trained components of each parameter, matrix or row stays as the budget has it; with a global budget
their sum stays. All numbers that decide are equal on all ranks, so every rank moves in the same way.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.optim import Optimizer

from sift_train.grown import note_growth
from sift_train.masters import SparseParameter
from sift_train.optimizer_states import check_states, first_moment, move_states
from sift_train.ranks.group import Ranks
from sift_train.ranks.scores import sum_scores
from sift_train.rules import Rule
from sift_train.scores import GradientScores
from sift_train.selection import (
    index_dtype,
    non_finite_lowest,
    seeded_generator,
    top_k_of_all,
    top_k_of_each,
)
from sift_train.structure import Block, drawn, n_rows, top_of_rows

_LOWEST = torch.finfo(torch.float32).min
_CPU = torch.device("cpu")


def check_movable(
    parts: Mapping[str, SparseParameter], block: Block | None, optimizer: Optimizer
) -> None:
    """Check that a choice can move.

    Raises:
        ValueError: a parameter is sharded, blocks are trained, or the states of the optimizer cannot move.
    """
    if block is not None:
        raise ValueError(f"block is {block!r}, but re-selection moves single components")
    for part in parts.values():
        if part.shard is not None:
            raise ValueError(
                f"parameter {part.name!r} is sharded, and re-selection needs whole parameters; train it without"
                " re-selection, or without shards"
            )
    check_states(optimizer, (part.master for part in parts.values()))


class Reselector:
    """One re-selection: collects the scores of all components, then moves the choice.

    Args:
        parts: the trained parameters by name, their components being chosen.
        optimizer: holds the states of their masters.
        rule: ranks the components that are not trained.
        share: share of the trained components to replace, 0 to 1.
        drop: which ones are dropped, as in ``Reselection``.
        keeps: whether dropped components keep their trained value.
        budget: as for ``Chooser``.
        seed: seeds all random choices, together with the number.
        number: of this re-selection.
    """

    def __init__(
        self,
        parts: Mapping[str, SparseParameter],
        optimizer: Optimizer,
        rule: Rule,
        *,
        share: float,
        drop: str,
        keeps: bool,
        budget: str,
        seed: int,
        number: int,
    ) -> None:
        sparse = {name: part for name, part in parts.items() if not part.is_dense}
        can_move = not all(part.trains_all for part in sparse.values())
        self._parts = sparse if can_move else {}
        self._optimizer = optimizer
        self._rule = rule
        self._share = share
        self._drop = drop
        self._keeps = keeps
        self._budget = budget
        self._seed = seed
        self._number = number
        self._scores: dict[str, GradientScores] = {}

    @property
    def needs_gradients(self) -> bool:
        """Whether gradients rank the components that are grown, and something may move."""
        return self._rule.from_gradient is not None and bool(self._share and self._parts)

    def score(self, part: SparseParameter, gradient: Tensor) -> None:
        """Add the scores of one dense gradient of a parameter."""
        if self.needs_gradients and part.name in self._parts:
            if part.name not in self._scores:
                self._scores[part.name] = self._new_scores()
            self._scores[part.name].add(part.local, gradient)

    def finish(self, ranks: Ranks) -> bool:
        """Move the choice, and return whether any component has moved; all ranks must call it.

        A parameter without a finite gradient keeps its components, if gradients rank.
        """
        if not self._share:
            return False
        names = list(self._parts)
        if self._rule.from_gradient is not None:
            parts = self._parts.values()
            self._scores = sum_scores(self._scores, parts, ranks, self._new_scores)
            names = [name for name in names if name in self._scores]
            names = [name for name in names if self._scores[name].has_scores]
        if self._budget == "global":
            return self._move_together(names)
        moved = [self._move_one(self._parts[name]) for name in names]
        return any(moved)

    def _new_scores(self) -> GradientScores:
        return GradientScores(self._rule, is_summed=True, keeps_gradient=False)

    def _generator(self, purpose: str) -> torch.Generator:
        return seeded_generator(self._seed, f"reselection/{self._number}/{purpose}")

    def _ranking(self, part: SparseParameter) -> Tensor:
        """Return the scores of all components of a part, flat, finite, on the CPU."""
        if self._rule.from_weight is not None:
            scores = self._rule.from_weight(
                part.parameter.detach(), self._generator(f"weight/{part.name}")
            ).to(_CPU)
        else:
            scores = self._scores.pop(part.name).ranking
        if self._rule.is_drawn:
            scores = drawn(scores, self._generator(f"draw/{part.name}"))
        return non_finite_lowest(scores.reshape(-1)).float().clamp_(min=_LOWEST)

    def _worth(self, part: SparseParameter, index: Tensor, ranking: Tensor) -> Tensor:
        """Return numbers of the trained components, shape (k,); the smallest are dropped."""
        if self._drop == "score":
            return ranking[index]
        if self._drop == "random":
            return torch.rand(len(index), generator=self._generator(f"drop/{part.name}"))
        if self._drop == "moment":
            return first_moment(self._optimizer, part.master).abs().to(_CPU)
        return part.change.to(_CPU)

    def _candidates(self, ranking: Tensor, index: Tensor, stays: Tensor) -> Tensor:
        """Return the ranking with -inf at the components that cannot be grown; it is edited in place."""
        ranking[stays if self._drop == "score" else index] = -torch.inf
        return ranking

    def _n_replaced(self, n_trained: int, n_all: int) -> int:
        if not n_trained:
            return 0
        return min(max(1, round(self._share * n_trained)), n_all - n_trained)

    def _move_one(self, part: SparseParameter) -> bool:
        index = part.flat_index.to(_CPU).long()
        n_groups = self._n_groups(part, index)
        per_group = len(index) // n_groups
        n = self._n_replaced(per_group, part.numel // n_groups)
        if not n:
            return False
        ranking = self._ranking(part)
        worth = self._worth(part, index, ranking)
        generator = self._generator(part.name)
        stays = index[self._top(worth, n_groups, per_group - n, generator)]
        candidates = self._candidates(ranking, index, stays)
        grown = self._top(candidates, n_groups, n, generator)
        return self._move(part, stays, grown)

    def _n_groups(self, part: SparseParameter, index: Tensor) -> int:
        """Return the number of matrices or rows that have equally many trained components each; 1 if a mask chose."""
        is_by_rows = self._budget == "row"
        n = n_rows(part.parameter.shape, part.n_matrices) if is_by_rows else part.n_matrices
        counts = torch.bincount(index // (part.numel // n), minlength=n)
        return n if bool((counts == counts[0]).all()) else 1

    def _top(self, scores: Tensor, n_groups: int, k: int, generator: torch.Generator) -> Tensor:
        """Return the flat indices of the k largest scores of each group."""
        groups = scores.view(n_groups, -1)
        if self._budget == "row":
            return top_of_rows(groups, 1, n_groups * k, generator).long()
        return top_k_of_each(groups, n_groups, n_groups * k, generator).long()

    def _move_together(self, names: list[str]) -> bool:
        parts = {name: self._parts[name] for name in names}
        held = {name: part.flat_index.to(_CPU).long() for name, part in parts.items()}
        n_trained = sum(len(index) for index in held.values())
        n = self._n_replaced(n_trained, sum(part.numel for part in parts.values()))
        if not n:
            return False
        ranking = {name: self._ranking(part) for name, part in parts.items()}
        worth = {name: self._worth(parts[name], held[name], ranking[name]) for name in names}
        generator = self._generator("")
        places = top_k_of_all(worth, n_trained - n, generator)
        none = torch.empty(0, dtype=torch.int64)
        stays = {name: held[name][places.get(name, none).long()] for name in names}
        candidates = {
            name: self._candidates(ranking[name], held[name], stays[name]) for name in names
        }
        grown = top_k_of_all(candidates, n, generator)
        moved = [self._move(parts[name], stays[name], grown[name].long()) for name in names]
        return any(moved)

    def _move(self, part: SparseParameter, stays: Tensor, grown: Tensor) -> bool:
        index = torch.cat([stays, grown]).sort().values.to(index_dtype(part.numel))
        n_before = part.train_num
        carry = part.move(index, keeps=self._keeps)
        if carry is None:
            return False
        move_states(self._optimizer, part.master, n_before, carry)
        note_growth(self._optimizer, part.master, n_before, carry)
        return True

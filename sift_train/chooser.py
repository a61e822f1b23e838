"""Chooses the components of every part: from weights at once, or from gradients as they come.

A part is chosen once; until then it is not trained. With a global budget all parts are chosen
together and share what each would have had.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sift_train.masters import SparseParameter
from sift_train.rules import Rule
from sift_train.scores import GradientScores
from sift_train.selection import (
    finite_or_zero,
    index_dtype,
    seeded_generator,
    top_k,
    top_k_of_all,
)

BUDGETS = ("tensor", "global")
_CPU = torch.device("cpu")


class Chooser:
    """Gathers scores for the parts of a model and chooses by them.

    Args:
        parts: by name.
        rule: how components are scored.
        budget: ``"tensor"``: each part its own k; ``"global"``: the sum of all k's, wherever the
            scores are largest.
        seed: of ties and of random selection.

    Raises:
        ValueError: the budget is not known.
    """

    def __init__(
        self, parts: Mapping[str, SparseParameter], rule: Rule, budget: str, seed: int
    ) -> None:
        if budget not in BUDGETS:
            raise ValueError(f"budget is {budget!r}; choose one of {', '.join(BUDGETS)}")
        self._parts = parts
        self._rule = rule
        self._seed = seed
        self._is_global = budget == "global"
        self._scores: dict[str, GradientScores] = {}

    def choose_without_gradients(self) -> None:
        """Choose what needs no gradient: dense parts, and all if the rule scores by weights."""
        for part in self._parts.values():
            if part.trains_all:
                numel = part.parameter.numel()
                part.take_up(torch.arange(numel, dtype=index_dtype(numel)))
        from_weight = self._rule.from_weight
        if from_weight is None:
            return
        scores = {}
        for name, part in self._parts.items():
            if part.is_selected:
                continue
            generator = seeded_generator(self._seed, name)
            raw = from_weight(part.parameter.detach(), generator)
            if self._is_global:
                scores[name] = finite_or_zero(raw.to(_CPU))
            else:
                part.take_up(top_k(raw, part.train_num, generator))
        if self._is_global:
            self._choose_together(scores)

    def score(
        self, part: SparseParameter, gradient: Tensor, *, at_once: bool, is_trained_on: bool
    ) -> None:
        """Take in one dense gradient of a part that is not chosen yet.

        Args:
            part: what the gradient is of.
            gradient: of the part's shape; not kept.
            at_once: choose by this one alone, unless the budget is global.
            is_trained_on: hand the chosen components' gradients to the master afterwards.
        """
        at_once = at_once and not self._is_global
        scores = self._scores.get(part.name)
        if scores is None:
            scores = GradientScores(self._rule, is_summed=not at_once, keeps_gradient=is_trained_on)
            self._scores[part.name] = scores
        scores.add(part.parameter.detach(), gradient)
        if at_once:
            self._choose(part, self._scores.pop(part.name))

    def finish(self) -> None:
        """Choose among the gradients seen so far; without effect if there are none."""
        if self._is_global:
            self._finish_together()
            return
        for name in list(self._scores):
            self._choose(self._parts[name], self._scores.pop(name))

    def clear(self) -> None:
        """Forget the gradients seen so far."""
        self._scores.clear()

    def _choose(self, part: SparseParameter, scores: GradientScores) -> None:
        if part.is_selected:  # by hand, meanwhile
            _hand_over(part, scores)
        elif scores.tells_apart:
            generator = seeded_generator(self._seed, part.name)
            part.take_up(top_k(scores.total, part.train_num, generator))
            _hand_over(part, scores)
        else:
            _stand_in(part, scores)

    def _finish_together(self) -> None:
        scores = {n: s for n, s in self._scores.items() if not self._parts[n].is_selected}
        chosen_by_hand = {n: s for n, s in self._scores.items() if n not in scores}
        self._scores.clear()
        for name, score in chosen_by_hand.items():
            _hand_over(self._parts[name], score)
        if not any(score.tells_apart for score in scores.values()):
            for name, score in scores.items():
                _stand_in(self._parts[name], score)
            return
        self._choose_together({name: score.total for name, score in scores.items()})
        for name, score in scores.items():
            _hand_over(self._parts[name], score)

    def _choose_together(self, scores: Mapping[str, Tensor]) -> None:
        """Choose for all parts that wait; those without scores get nothing."""
        waiting = {name: part for name, part in self._parts.items() if not part.is_selected}
        total = sum(part.train_num for part in waiting.values())
        numel = sum(score.numel() for score in scores.values())
        generator = seeded_generator(self._seed, "")
        chosen: dict[str, Any] = top_k_of_all(scores, min(total, numel), generator)
        for name, part in waiting.items():
            part.take_up(chosen.get(name, torch.empty(0, dtype=torch.int32)))


def choose_by_hand(
    model: nn.Module, parts: Iterable[SparseParameter], masks: Mapping[str, Any]
) -> None:
    """Choose what masks, flat indices or coordinates name, by a parameter's name in the model.

    Raises:
        ValueError: a mask has another shape than its parameter, or an index is not sound.
    """
    own = {id(part.parameter): part for part in parts}
    for name, mask in masks.items():
        part = own[id(model.get_parameter(name))]
        given = torch.as_tensor(mask)
        if given.dtype != torch.bool:
            part.idx = given
        elif given.shape == part.parameter.shape:
            part.choose(given.flatten().nonzero().flatten())
        else:
            raise ValueError(
                f"the mask of {name!r} has shape {tuple(given.shape)}, "
                f"expected {tuple(part.parameter.shape)}"
            )


def _hand_over(part: SparseParameter, scores: GradientScores) -> None:
    if scores.gradient is not None:
        part.collect(scores.gradient.to(part.parameter.device))


def _stand_in(part: SparseParameter, scores: GradientScores) -> None:
    # A gradient scaler looks for overflow in the master's gradient; the step drops the stand-in.
    if scores.gradient is not None:
        overflow = scores.gradient.sum().to(part.master)
        part.master.grad = overflow.expand(part.train_num).clone()

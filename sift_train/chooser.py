"""Chooses the components of each parameter, by its weights at the start or by its gradients later.

The components of a parameter are chosen once, before it is trained. With a global budget
the components of all parameters are chosen together; their number is the same as without it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sift_train.lr_transfer import LearningRate
from sift_train.masters import SparseParameter
from sift_train.ranks.group import ALONE, Ranks
from sift_train.ranks.scores import (
    count_over_shards,
    has_scores,
    largest_of_all,
    share_scores,
)
from sift_train.ranks.shard import Shard, whole_or_self
from sift_train.ranks.threshold import top_k_of_shards
from sift_train.reselector import Reselector, check_movable
from sift_train.rules import Rule
from sift_train.scores import GradientScores
from sift_train.selection import (
    finite_or_zero,
    index_dtype,
    seeded_generator,
    top_k_of_each,
)
from sift_train.structure import Block, check_block, drawn, top_blocks, top_of_rows

BUDGETS = ("tensor", "row", "global")

logger = logging.getLogger(__name__)
_CPU = torch.device("cpu")


class Chooser:
    """Collects the scores of a model's parts and chooses their components.

    Args:
        parts: the parts by name; each is a parameter with its master.
        rule: the rule that scores components.
        budget: ``"tensor"``: each part gets its own k components, and each matrix of a part the same
            number; ``"row"``: each row; ``"global"``: the largest scores of all parts are chosen; their number
            is the sum of all k.
        seed: seeds the choice among equal scores, and random selection.
        rate: share of the blocks that are chosen, if ``block`` is given.
        block: the units that are chosen, as for ``SIFT``.
        learning_rate: measures the share of the gradients that is chosen; None: it is not measured.

    Raises:
        ValueError: the budget is none of these; or rows or blocks are wanted where they cannot be chosen.
    """

    def __init__(
        self,
        parts: Mapping[str, SparseParameter],
        rule: Rule,
        budget: str,
        seed: int,
        rate: float = 0.0,
        block: Block | None = None,
        learning_rate: LearningRate | None = None,
    ) -> None:
        if budget not in BUDGETS:
            raise ValueError(f"budget is {budget!r}; choose one of {', '.join(BUDGETS)}")
        check_block(block)
        if block is not None and budget != "tensor":
            raise ValueError(f"budget is {budget!r}, but blocks have the budget 'tensor' only")
        if block is not None or budget == "row":
            _refuse_shards(parts.values())
        self._parts = parts
        self._rate = rate
        self._block = block
        self._budget = budget
        self._is_by_rows = budget == "row"
        self._rule = rule
        self._seed = seed
        self._has_warned = False
        self._is_global = budget == "global"
        self._learning_rate = learning_rate
        self._scores: dict[str, GradientScores] = {}

    def choose_without_gradients(self) -> None:
        """Choose dense parts, and all other parts if the rule scores by weights."""
        for part in self._parts.values():
            if part.trains_all:
                numel = part.local.numel()
                part.take_up(torch.arange(numel, dtype=index_dtype(numel)))
        from_weight = self._rule.from_weight
        if from_weight is None:
            return
        scores = {}
        for name, part in self._parts.items():
            if part.is_selected:
                continue
            generator = seeded_generator(self._seed, name)
            raw = from_weight(whole_or_self(part.parameter.detach()), generator)
            own = raw if part.shard is None else part.shard.cut(raw)
            if self._is_global:
                scores[name] = finite_or_zero(own.to(_CPU))
            else:
                part.take_up(self._best(part, own, generator))
        if self._is_global:
            self._choose_together(scores)

    def score(
        self, part: SparseParameter, gradient: Tensor, *, at_once: bool, is_trained_on: bool
    ) -> None:
        """Add the scores of one dense gradient of a part that is not chosen yet.

        Args:
            part: the part that the gradient belongs to.
            gradient: of the parameter's shape.
            at_once: choose by this gradient alone, unless the budget is global.
            is_trained_on: after the choice, add the chosen components' gradients to the master's.
        """
        at_once = at_once and not self._is_global
        scores = self._scores.get(part.name)
        if scores is None:
            scores = self._new_scores(is_summed=not at_once, keeps_gradient=is_trained_on)
            self._scores[part.name] = scores
        scores.add(part.local, gradient)
        if at_once:
            self._warn_of_one_batch()
            self._choose(part, self._scores.pop(part.name))

    def finish(self, ranks: Ranks = ALONE) -> None:
        """Choose by the gradients added so far on all ranks; no effect if there are none."""
        if ranks.size > 1:
            self._scores = share_scores(
                self._scores,
                self._parts.values(),
                ranks,
                partial(self._new_scores, is_summed=True, keeps_gradient=False),
            )
        if self._is_global:
            self._finish_together()
            return
        for name in list(self._scores):
            self._choose(self._parts[name], self._scores.pop(name))

    def reselector(
        self, optimizer: Optimizer, rule: Rule, *, share: float, drop: str, keeps: bool, number: int
    ) -> Reselector:
        """Return what moves this choice once; the arguments are those of ``Reselector``."""
        return Reselector(
            self._parts,
            optimizer,
            rule,
            share=share,
            drop=drop,
            keeps=keeps,
            budget=self._budget,
            seed=self._seed,
            number=number,
        )

    def check_movable(self, optimizer: Optimizer) -> None:
        """Check that this choice can move.

        Raises:
            ValueError: it cannot, see ``reselector.check_movable``.
        """
        check_movable(self._parts, self._block, optimizer)

    @property
    def is_waiting(self) -> bool:
        """Whether there are scores by which nothing was chosen yet."""
        return bool(self._scores)

    def clear(self) -> None:
        """Drop the scores and gradients added so far."""
        self._scores.clear()

    def _warn_of_one_batch(self) -> None:
        if not self._has_warned:
            self._has_warned = True
            logger.warning(
                "the gradients of one micro-batch choose the components, which is a poor choice if it is small; choose by"
                " several inside sift.selecting(), or by a rule without gradients, such as 'random'"
            )

    def _best(self, part: SparseParameter, scores: Tensor, generator: torch.Generator) -> Tensor:
        """Return the flat indices of the components of a part that its scores choose."""
        if self._block is not None:
            return top_blocks(
                scores,
                part.n_matrices,
                self._rate,
                self._block,
                seed=self._seed,
                name=part.name,
                draw=self._rule.is_drawn,
            )
        final = self._drawn(part, scores)
        if self._is_by_rows:
            return top_of_rows(final, part.n_matrices, part.n_wanted, generator)
        return _largest(part, final, generator)

    def _drawn(self, part: SparseParameter, scores: Tensor) -> Tensor:
        """Return scores with random numbers, if the rule draws, otherwise the scores."""
        if not self._rule.is_drawn:
            return scores
        generator = seeded_generator(self._seed, f"draw/{part.name}")
        if part.shard is None:
            return drawn(scores, generator)
        return drawn(scores, generator, part.shard)

    def _new_scores(self, *, is_summed: bool, keeps_gradient: bool) -> GradientScores:
        return GradientScores(
            self._rule,
            is_summed=is_summed,
            keeps_gradient=keeps_gradient,
            keeps_magnitudes=self._learning_rate is not None,
        )

    def _use(self, part: SparseParameter, scores: GradientScores) -> None:
        """Train on the gradient that has chosen the components, and measure what they hold of it."""
        if self._learning_rate is not None and scores.magnitudes is not None:
            self._learning_rate.add(part, scores.magnitudes, n_ranks=scores.n_ranks)
        if scores.gradient is not None:
            part.collect(scores.gradient.to(part.local.device))

    def _choose(self, part: SparseParameter, scores: GradientScores) -> None:
        if part.is_selected:  # the caller has set idx meanwhile
            self._use(part, scores)
        elif has_scores([part], [scores]):
            generator = seeded_generator(self._seed, part.name)
            part.take_up(self._best(part, scores.ranking, generator))
            self._use(part, scores)
        else:
            _mark_overflow(part, scores)

    def _finish_together(self) -> None:
        parts = {n: part for n, part in self._parts.items() if n in self._scores}
        scores = {n: self._scores[n] for n, part in parts.items() if not part.is_selected}
        chosen_by_hand = {n: s for n, s in self._scores.items() if n not in scores}
        self._scores.clear()
        for name, score in chosen_by_hand.items():
            self._use(self._parts[name], score)
        if not has_scores([parts[name] for name in scores], list(scores.values())):
            for name, score in scores.items():
                _mark_overflow(self._parts[name], score)
            return
        self._choose_together(
            {name: self._drawn(parts[name], score.ranking) for name, score in scores.items()}
        )
        for name, score in scores.items():
            self._use(self._parts[name], score)

    def _choose_together(self, scores: Mapping[str, Tensor]) -> None:
        """Choose for all parts not chosen yet; parts without scores get no components."""
        unchosen = {name: part for name, part in self._parts.items() if not part.is_selected}
        total = sum(part.n_wanted for part in unchosen.values())
        sizes = [unchosen[name].shard or scores[name] for name in scores]
        numel = sum(s.numel if isinstance(s, Shard) else s.numel() for s in sizes)
        generator = seeded_generator(self._seed, "")
        chosen: dict[str, Any] = largest_of_all(unchosen, scores, min(total, numel), generator)
        for name, part in unchosen.items():
            part.take_up(chosen.get(name, torch.empty(0, dtype=torch.int32)))
        count_over_shards(unchosen.values())


def choose_by_hand(
    model: nn.Module, parts: Iterable[SparseParameter], masks: Mapping[str, Any]
) -> None:
    """Choose the components that masks, flat indices or coordinates give, by parameter name.

    Raises:
        ValueError: a mask has another shape than its parameter, or an index is invalid.
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


def _largest(part: SparseParameter, scores: Tensor, generator: torch.Generator) -> Tensor:
    if part.shard is None:
        return top_k_of_each(scores, part.n_matrices, part.n_wanted, generator)
    return top_k_of_shards({"": scores}, part.n_wanted, generator, {"": part.shard})[""]


def _refuse_shards(parts: Iterable[SparseParameter]) -> None:
    for part in parts:
        if part.shard is not None:
            raise ValueError(
                f"parameter {part.name!r} is sharded, so no rank holds all of its rows or blocks; use"
                " budget='tensor' without block"
            )


def _mark_overflow(part: SparseParameter, scores: GradientScores) -> None:
    # A gradient scaler checks the master's gradient for inf and NaN. The step drops this gradient.
    if scores.gradient is not None:
        overflow = scores.gradient.sum().to(part.master)
        part.master.grad = overflow.expand(part.train_num).clone()

"""Sums the scores of one tensor over micro-batches, until its components are chosen.

A non-finite score counts as 0 in a sum, and ``top_k`` ranks it last. Sums over several
micro-batches are on the CPU, so a device holds only one dense gradient and its scores, both in the
gradient's dtype. If these micro-batches are also trained on, the dense gradient is summed as well.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sift_train.rules import RULES, Rule
from sift_train.selection import finite_or_zero, slices_of

_CPU = torch.device("cpu")


class GradientScores:
    """The summed scores of one tensor, and optionally its summed gradient.

    Attributes:
        total: summed scores, of the tensor's shape; a scalar 0 before the first ``add``.
        gradient: summed dense gradient, None if ``keeps_gradient`` is False.
        n_ranks: number of ranks over which ``total`` is summed; the caller sets it.

    Args:
        rule: the rule that scores components.
        is_summed: True if several micro-batches are added. Sums are then on the CPU, in at least
            fp32, and non-finite scores count as 0. If False, the scores and the gradient of the one
            micro-batch are kept unchanged.
        keeps_gradient: also sum the gradient.
        keeps_magnitudes: also sum |gradient|, if the scores are another sum.
    """

    def __init__(
        self, rule: Rule, *, is_summed: bool, keeps_gradient: bool, keeps_magnitudes: bool = False
    ) -> None:
        self._rule = rule
        self._is_summed = is_summed
        self._keeps_gradient = keeps_gradient
        self.total: Tensor = torch.zeros(())
        self.gradient: Tensor | None = None
        self._keeps_magnitudes = keeps_magnitudes
        self._scores_are_magnitudes = rule.from_gradient is RULES["gradient"].from_gradient
        self._magnitudes: Tensor | None = None
        self.n_ranks = 1
        self._n_added = 0

    @property
    def magnitudes(self) -> Tensor | None:
        """The sum of |gradient|, the gradient itself if nothing is summed; None without ``keeps_magnitudes``."""
        if self._keeps_magnitudes and self._scores_are_magnitudes and self._n_added:
            return self.total
        return self._magnitudes

    @property
    def ranking(self) -> Tensor:
        """The scores that rank the components: ``total``, or its absolute value if the rule's scores have signs."""
        return self.total.abs() if self._rule.is_signed else self.total

    def fill_with_zeros(self, weight: Tensor) -> None:
        """Set the scores to 0 for all components of a weight, as if it had a gradient of zeros."""
        self.total = torch.zeros(
            weight.shape, dtype=torch.promote_types(weight.dtype, torch.float32)
        )
        self._n_added = 1

    def add(self, weight: Tensor, gradient: Tensor) -> None:
        """Add the gradient of one micro-batch.

        Raises:
            ValueError: the rule does not use gradients, or does not return one score per component.
        """
        if self._rule.from_gradient is None:
            raise ValueError("this selection rule does not use gradients")
        raw = self._rule.from_gradient(weight, gradient)
        if raw.shape != weight.shape:
            raise ValueError(
                f"the selection rule returned scores of shape {tuple(raw.shape)} for a parameter "
                f"of shape {tuple(weight.shape)}; return one score per component"
            )
        if not self._is_summed:
            self.total = raw.detach()
            self.gradient = gradient if self._keeps_gradient else None
            self._magnitudes = gradient if self._keeps_magnitudes else None
            return
        scores = finite_or_zero(raw.detach().to(_CPU))
        wide = torch.promote_types(gradient.dtype, torch.float32)
        held = gradient.to(_CPU, wide) if self._keeps_gradient else None
        if self._n_added == 0:
            self.total, self.gradient = scores, held
        else:
            self.total += scores
            if held is not None and self.gradient is not None:
                self.gradient = (
                    self.gradient + held
                )  # not in place: the first sum may be the gradient itself
        if self._keeps_magnitudes and not self._scores_are_magnitudes:
            own = finite_or_zero(gradient.to(_CPU)).abs_()
            self._magnitudes = own if self._magnitudes is None else self._magnitudes.add_(own)
        self._n_added += 1

    @property
    def has_scores(self) -> bool:
        """Whether any component has a finite score other than 0; otherwise all scores are equal."""
        parts = slices_of(self.total.reshape(-1))
        return any(bool(part.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).any()) for part in parts)

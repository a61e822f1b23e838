"""The running scores of one tensor while its components are being chosen.

Only finite gradient entries score. What is summed over micro-batches lies on the CPU, so no device
ever holds more than the one dense gradient and its scores, both in the gradient's own dtype. The
dense gradient itself is summed beside the scores when the micro-batches that choose are trained on
too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sift_train.rules import Rule
from sift_train.selection import finite_or_zero, slices_of

_CPU = torch.device("cpu")


class GradientScores:
    """Sums over micro-batches for one tensor.

    Attributes:
        total: summed scores, of the tensor's shape; meaningful after the first ``add``.
        gradient: summed dense gradient, None if it is not kept.

    Args:
        rule: how components are scored.
        is_summed: more than one micro-batch is taken in: sums lie on the CPU, in at least fp32, and
            count what is not finite as nothing. Otherwise scores and gradient stay as they come.
        keeps_gradient: sum the gradient beside the scores.
    """

    def __init__(self, rule: Rule, *, is_summed: bool, keeps_gradient: bool) -> None:
        self._rule = rule
        self._is_summed = is_summed
        self._keeps_gradient = keeps_gradient
        self.total: Tensor = torch.zeros(())
        self.gradient: Tensor | None = None
        self._n_added = 0

    def add(self, weight: Tensor, gradient: Tensor) -> None:
        """Take in the gradient of one micro-batch.

        Raises:
            ValueError: the rule scores without gradients, or not one score a component.
        """
        if self._rule.from_gradient is None:
            raise ValueError("this selection rule does not score by gradients")
        raw = self._rule.from_gradient(weight, gradient)
        if raw.shape != weight.shape:
            raise ValueError(
                f"the selection rule gave scores of shape {tuple(raw.shape)} for a parameter of "
                f"shape {tuple(weight.shape)}; give one score a component"
            )
        if not self._is_summed:
            self.total = raw.detach()
            self.gradient = gradient if self._keeps_gradient else None
            return
        scores = finite_or_zero(raw.detach().to(_CPU))
        wide = torch.promote_types(gradient.dtype, torch.float32)
        held = gradient.to(_CPU, wide) if self._keeps_gradient else None
        if self._n_added == 0:
            self.total, self.gradient = scores, held
        else:
            self.total += scores
            if held is not None and self.gradient is not None:
                self.gradient = self.gradient + held  # the first may be the gradient itself
        self._n_added += 1

    @property
    def tells_apart(self) -> bool:
        """Whether any component has a score, so that a choice is better than a blind one."""
        parts = slices_of(self.total.reshape(-1))
        return any(bool(part.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).any()) for part in parts)

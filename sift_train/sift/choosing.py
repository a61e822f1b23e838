"""``Choosing``: the choice of the trained components, and the share of the gradient that it holds.

Gradients that choose, move the choice or measure the share come from backward passes inside a block, which are not
trained on, or from those of the first step.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from sift_train.buffers import set_buffers
from sift_train.chooser import Chooser
from sift_train.lr_transfer import LearningRate
from sift_train.masters import SparseParameter
from sift_train.optimizer_states import unwrapped
from sift_train.ranks.sync import Synchronizer
from sift_train.reselection import check_move
from sift_train.reselector import Reselector
from sift_train.rules import Selection
from sift_train.scalers import refuse_unscaled
from sift_train.sift.weights import WrittenBack

logger = logging.getLogger(__name__)


class Choosing(WrittenBack):
    """A trained model whose components are chosen, and may be chosen again.

    Args:
        model: the model.
        parts: its trained parameters.
        sync: keeps the masters equal on all ranks.
        chooser: chooses the components of the parts.
        learning_rate: measures the share of the gradient that they hold.
        lr_transfer: as for ``SIFT``.
    """

    def __init__(
        self,
        model: nn.Module,
        parts: Sequence[SparseParameter],
        sync: Synchronizer,
        chooser: Chooser,
        learning_rate: LearningRate,
        *,
        lr_transfer: bool,
    ) -> None:
        super().__init__(model, parts, sync, lr_transfer=lr_transfer)
        self._chooser = chooser
        self._learning_rate = learning_rate
        self._n_reselections = 0
        self._only_scoring = False
        self._reselector: Reselector | None = None  # inside ``reselecting``

    @property
    def lr_share(self) -> float | None:
        """Share of the sum of |gradient| over the sparsely trained parameters that the chosen components hold.

        With ``lr_transfer`` it is measured by the gradients that choose, or anew by those inside
        ``measuring_share()``. If masks or a rule without gradients
        choose, by those inside ``selecting()`` or of the first step. With ``"random"`` it is the share of
        components that are chosen. None until then, and without ``lr_transfer``.
        """
        return self._learning_rate.share

    @lr_share.setter
    def lr_share(self, share: float | None) -> None:
        self._learning_rate.share = share

    @property
    def n_reselections(self) -> int:
        """Number of times that ``reselecting`` has moved the choice."""
        return self._n_reselections

    @n_reselections.setter
    def n_reselections(self, number: int) -> None:
        self._n_reselections = number
        self._learning_rate.has_moved = number > 0

    def sparse_lr(self, lr: float) -> float:
        """Return the learning rate of sparsely trained parameters for a stated one."""
        return float(self._learning_rate.sparse(lr))

    @contextmanager
    def selecting(self) -> Iterator[None]:
        """Choose the components by the backward passes inside the block, without training on them.

        The model's buffers, such as running statistics, are restored afterwards. If all components are chosen, only ``lr_share``
        is measured, or nothing if it is known; then a warning is logged.
        """
        measures = self.lr_transfer and self.lr_share is None
        if not measures and all(part.is_selected for part in self.sparse_mapping.values()):
            logger.warning(
                "selecting() has no effect, because all components are chosen already; choose by gradients with"
                " selection='gradient', or anew with reselecting()"
            )
        with self._scoring():
            yield

    @contextmanager
    def _scoring(self) -> Iterator[None]:
        """Take the backward passes inside the block for the choice only; restore the buffers afterwards."""
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        self._only_scoring = True
        try:
            yield
            self.finish_selection()
        finally:
            self._only_scoring = False
            self._chooser.clear()
            set_buffers(self.model, buffers)

    @contextmanager
    def reselecting(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        share: float = 0.2,
        drop: str = "change",
        grow: Selection = "random",
        dropped: str = "revert",
    ) -> Iterator[None]:
        """Drop trained components and grow as many others, by the backward passes inside the block.

        The block is not trained on, and is empty if ``grow`` ranks without gradients. The choice moves at its
        end. Call it between two steps, with no gradients waiting. Masters and optimizer states of the components that
        stay are not changed; the states of grown ones are 0, and torch's Adam and AdamW count their steps from then on.
        With ``lr_transfer`` the share is measured anew, by ``measuring_share()`` afterwards or by the next step's
        gradients. The model's buffers are restored. All ranks must call it together.

        Args:
            optimizer: the one that holds all masters.
            share: share of the trained components that may be replaced, 0 to 1; at least one if it is above 0.
            drop: which are dropped: smallest ``"change"``, smallest first ``"moment"``, ``"random"``, or smallest
                ``"score"``, as for ``Reselection``.
            grow: the rule that ranks the components that are not trained.
            dropped: ``"revert"``: dropped components get their original value; ``"keep"``: they keep the trained one.

        Raises:
            RuntimeError: the components are not chosen yet, or gradients wait for a step.
            ValueError: a setting is out of range; the optimizer lacks a master; its states cannot move, such as 8-bit
                ones; blocks are trained, or parameters are sharded.
        """
        rule = check_move(share=share, drop=drop, grow=grow, dropped=dropped)
        self.check_reselecting(optimizer)
        optimizer = unwrapped(optimizer)
        parts = self.sparse_mapping.values()
        if not all(part.is_selected for part in parts):
            raise RuntimeError(
                "the components are not chosen yet, so the choice cannot move; choose them before, for example inside"
                " sift.selecting()"
            )
        if any(part.pending_gradient is not None for part in parts):
            raise RuntimeError(
                "gradients wait for a step, and would belong to other components afterwards; call reselecting() after"
                " optimizer.step() or zero_grad()"
            )
        self.before_use()
        self._reselector = self._chooser.reselector(
            optimizer,
            rule,
            share=share,
            drop=drop,
            keeps=dropped == "keep",
            number=self.n_reselections,
        )
        try:
            with self._scoring():
                yield
            if self._reselector.finish(self._sync.ranks):
                self.n_reselections += 1
                self._learning_rate.forget()
        finally:
            self._reselector = None

    def check_reselecting(self, optimizer: torch.optim.Optimizer) -> None:
        """Check that ``reselecting`` can move the choice and the states that the optimizer has so far.

        Raises:
            ValueError: as ``reselecting``.
        """
        self.attach(optimizer)
        self._chooser.check_movable(unwrapped(optimizer))

    @contextmanager
    def measuring_share(self) -> Iterator[None]:
        """Measure ``lr_share`` anew by the backward passes inside the block, without training on them.

        Rules that choose by gradients fit the micro-batches that choose, so the share measured there is too
        large. Give other micro-batches here, after the choice. If the block has no finite gradient, or raises,
        the share stays. With ``"random"`` and without ``lr_transfer`` nothing is measured. The model's
        buffers are restored afterwards. All ranks must call it together.

        Raises:
            RuntimeError: the components are not chosen yet.
        """
        if not all(part.is_selected for part in self.sparse_mapping.values()):
            raise RuntimeError(
                "the components are not chosen yet, so their share of the gradient cannot be measured; choose"
                " them before, for example inside sift.selecting()"
            )
        with self._learning_rate.measured_anew(), self._scoring():
            yield

    def finish_selection(self) -> None:
        """Choose the components by the gradients seen so far, as the optimizer's first step does.

        If ``grad_acc`` is above 1 or the budget is global, and something reads the masters' gradients before a
        step, such as a gradient scaler, call this first. It has no effect if all components are chosen.

        Raises:
            RuntimeError: a gradient scaler has unscaled the gradients already.
        """
        if self._chooser.is_waiting and not self._only_scoring:
            refuse_unscaled(self.parameters_in_optimizer())
        self._chooser.finish(self._sync.ranks)
        if self.lr_transfer:
            self._learning_rate.finish(self._sync.ranks)

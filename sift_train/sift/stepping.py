"""``Stepping``: what happens before and after each step of an optimizer that holds masters.

Before a step the gradients of the ranks are averaged and components are chosen that were not yet; after it the masters
are written back. ``steps`` calls these methods at the steps of all torch optimizers.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from weakref import WeakSet

import torch
from torch import Tensor, nn

from sift_train.chooser import Chooser
from sift_train.groups import BASE_DECAY
from sift_train.grown import correct_grown
from sift_train.lean import Rounding
from sift_train.lr_transfer import LearningRate
from sift_train.masters import SparseParameter
from sift_train.ranks.norm import clip_shards
from sift_train.ranks.sync import Synchronizer
from sift_train.sift.choosing import Choosing

logger = logging.getLogger(__name__)


class Stepping(Choosing):
    """A trained model whose masters optimizers step.

    Attributes:
        rounding: the random numbers of ``masters="stochastic"``.

    Args:
        model: the model.
        parts: its trained parameters.
        sync: keeps the masters equal on all ranks.
        chooser: chooses the components of the parts.
        learning_rate: scales the learning rates during a step.
        rounding: the random numbers that the parts use.
        lr_transfer: as for ``SIFT``.
    """

    def __init__(
        self,
        model: nn.Module,
        parts: Sequence[SparseParameter],
        sync: Synchronizer,
        chooser: Chooser,
        learning_rate: LearningRate,
        rounding: Rounding,
        *,
        lr_transfer: bool,
    ) -> None:
        super().__init__(model, parts, sync, chooser, learning_rate, lr_transfer=lr_transfer)
        self.rounding = rounding
        self._optimizers: WeakSet[torch.optim.Optimizer] = WeakSet()  # that have stepped
        self._without_optimizer = set(self.sparse_mapping)
        self._has_gradient: bool | None = None  # of a master in this step; None between steps
        self._n_idle = 0  # steps in a row without one, up to 2
        self._by_master = {id(part.master): part for part in parts}

    def sync_gradients(self, weight: float | None = None) -> None:
        """Complete the masters' gradients: wait for those on their way to the CPU, and average them over the ranks.

        Without ``masters_device="cpu"`` it has no effect in a single process. ``clip_grad_norm_`` and the step of a torch
        optimizer call it. Call it yourself to give a weight, before something else reads the gradients, such as a gradient
        scaler's ``unscale_`` or ``step``, and before the step of another optimizer.

        Args:
            weight: share of this rank in the mean, such as its number of examples or tokens; 0 if it
                has no batch. All ranks must give one, or none, which means equal shares.

        Raises:
            ValueError: the model is wrapped for several devices; the ranks hold different weights
                before the first step; or the weights are negative or all 0.
            RuntimeError: another rank has stopped.
        """
        self.finish_selection()
        for part in self.sparse_mapping.values():
            part.arrive()
        self._sync.average(weight)

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Clip the gradient of the trained components; return its norm before clipping."""
        self.sync_gradients()
        if not self._has_shards:
            return nn.utils.clip_grad_norm_(self.parameters_in_optimizer(), max_norm)
        return clip_shards(self.sparse_mapping.values(), max_norm)

    def zero_grad(self) -> None:
        """Drop the masters' gradients; ``model.zero_grad()`` also does this."""
        for master in self.parameters_in_optimizer():
            master.grad = None

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Prepare the masters for an optimizer's step; every torch optimizer calls it.

        Raises:
            ValueError: the optimizer holds parameters of the model that this SIFT trains, or a trained
                parameter was replaced, converted or renamed.
        """
        parts = self._parts_of(optimizer)
        if not parts:
            self._refuse_own_parameters(optimizer, set(self.trainable_parameters()))
            return
        self._check_identity()
        self._warn_without_optimizer(optimizer, parts)
        for part in parts:
            if part.is_overwritten:
                part.adopt()
        if self._is_lean:
            self.rounding.n_steps += 1
        self.after_closure(optimizer)
        for group in optimizer.param_groups:
            for master in group["params"]:
                trained = self._by_master.get(id(master))
                if trained is not None and trained.is_selected and group.get(BASE_DECAY):
                    trained.decay_to_original(float(group["lr"]) * group[BASE_DECAY])

    def after_closure(self, optimizer: torch.optim.Optimizer) -> None:
        """Choose by the gradients of this step; drop the gradients of masters not chosen yet."""
        parts = self._parts_of(optimizer)
        if parts:
            self.sync_gradients()
            has_gradient = any(part.master.grad is not None for part in parts)
            self._has_gradient = bool(self._has_gradient) or has_gradient
        for part in parts:
            part.load()
            if not part.is_selected:
                part.master.grad = None
        if parts and self.lr_transfer:
            self._learning_rate.scale(optimizer)

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Write the masters of an optimizer back after its step; every torch optimizer calls it."""
        parts = self._parts_of(optimizer)
        if parts:
            self._warn_without_gradient(parts)
            self._correct_grown(optimizer)
            self._learning_rate.restore()
        for part in parts:
            self._is_stepped_by_torch = self._is_stepped = True
            part.spend()
            if part.is_selected:
                part.write(self.may_write)
            part.release()
        if parts:
            self.reshard()
            self._sync.after_step()

    def _correct_grown(self, optimizer: torch.optim.Optimizer) -> None:
        if not self.n_reselections:
            return
        for group in optimizer.param_groups:
            for master in group["params"]:
                if id(master) in self._by_master:
                    correct_grown(optimizer, group, master)

    def _warn_without_optimizer(
        self, optimizer: torch.optim.Optimizer, parts: list[SparseParameter]
    ) -> None:
        """Warn once, at an optimizer's second step, of masters that no optimizer has stepped."""
        self._without_optimizer -= {part.name for part in parts}
        if self._without_optimizer and optimizer in self._optimizers:
            logger.warning(
                "no optimizer trains %d of the %d masters, such as %r; build the optimizer from all of"
                " sift.parameters_in_optimizer()",
                len(self._without_optimizer),
                len(self.sparse_mapping),
                min(self._without_optimizer),
            )
            self._without_optimizer.clear()
        self._optimizers.add(optimizer)

    def _warn_without_gradient(self, parts: list[SparseParameter]) -> None:
        """Warn once if two steps in a row with all masters had no gradient, so that they changed nothing.

        One such step may be meant: some make one before a scheduler's first.
        """
        had_gradient, self._has_gradient = self._has_gradient, None
        if had_gradient is None:  # the step of a subclass, after that of its base class
            return
        if len(parts) < len(self.sparse_mapping) or self._n_idle == 2:  # said already
            return
        self._n_idle = 0 if had_gradient else self._n_idle + 1
        if self._n_idle < 2:
            return
        frozen = [part.name for part in parts if not part.parameter.requires_grad]
        logger.warning(
            "the last two steps changed nothing, because no trained parameter had a gradient: %s",
            f"{len(frozen)} of {len(parts)}, such as {frozen[0]!r}, were frozen (requires_grad=False) after the SIFT was created"
            if frozen
            else "compute the loss with the model that the SIFT trains, and call backward() before the step",
        )

    def _parts_of(self, optimizer: torch.optim.Optimizer) -> list[SparseParameter]:
        masters = (master for group in optimizer.param_groups for master in group["params"])
        return [self._by_master[id(m)] for m in masters if id(m) in self._by_master]

    @property
    def _is_lean(self) -> bool:
        return any(part.lean is not None for part in self.sparse_mapping.values())

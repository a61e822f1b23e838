"""``LearningRate``: full fine-tuning's learning rate, scaled to the share of the gradient that is trained.

Adam moves every component by about the learning rate. So the first-order change of the loss per step is
the learning rate times the sum of |gradient| over the trained components. Divided by the share of
this sum that the selection holds, a learning rate of full fine-tuning gives the same change.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from sift_train.masters import SparseParameter
from sift_train.ranks.group import Ranks
from sift_train.selection import finite_or_zero, slices_of

logger = logging.getLogger(__name__)


class LearningRate:
    """Measures the share, and scales the learning rates of an optimizer while it steps.

    Attributes:
        share: share of the sum of |gradient| over the sparsely trained parameters that their chosen
            components hold, above 0 to 1; None until it is measured.
        has_moved: whether a re-selection has moved the choice, which is not uniform then.

    Args:
        parts: the trained parameters by name; dense ones keep the learning rate as stated.
        is_uniform: the choice does not depend on weights or gradients. The share is then the share of
            components that are chosen.
    """

    def __init__(self, parts: Mapping[str, SparseParameter], *, is_uniform: bool) -> None:
        self.share: float | None = None
        self.has_moved = False
        self._parts = {name: part for name, part in parts.items() if not part.is_dense}
        self._masters = {id(part.master) for part in self._parts.values()}
        self._starts_uniform = is_uniform
        self._sums: dict[torch.device, Tensor] = {}
        # While an optimizer steps: the groups that are scaled, those that they are parts of, and their rates as stated;
        # the optimizer and its own groups.
        self._stated: list[tuple[dict[str, Any], dict[str, Any], Any]] = []
        self._groups: tuple[Optimizer, list[dict[str, Any]]] | None = None
        self._is_logged = False

    @property
    def _is_uniform(self) -> bool:
        return self._starts_uniform and not self.has_moved

    @property
    def is_measuring(self) -> bool:
        """Whether gradients of all components are needed to measure the share."""
        return self.share is None and not self._is_uniform

    def add(self, part: SparseParameter, magnitudes: Tensor, *, n_ranks: int = 1) -> None:
        """Add gradients of a parameter whose components are chosen; no effect once the share is known.

        Args:
            part: the parameter.
            magnitudes: a gradient, or a sum of |gradient|, of the shape of the parameter's part here.
            n_ranks: number of ranks over which ``magnitudes`` is a sum already.
        """
        if not self.is_measuring or part.name not in self._parts:
            return
        total = chosen = _sum(magnitudes)
        if not part.trains_all:
            index = part.flat_index.to(magnitudes.device)
            chosen = _sum(magnitudes.reshape(-1).index_select(0, index))
        # Gradients of shards are means over the ranks, and those of whole parameters are of one rank.
        weight = 1 / n_ranks if part.shard is None else part.shard.n_parts
        sums = torch.stack([chosen, total]) * weight
        held = self._sums.get(sums.device)
        self._sums[sums.device] = sums if held is None else held + sums

    def finish(self, ranks: Ranks) -> None:
        """Compute the share from what all ranks have added; no effect if it is known, or if that is nothing.

        All ranks must call it the same number of times.
        """
        if self.share is not None:
            return
        if self._is_uniform:
            parts = self._parts.values()
            chosen = float(sum(part.n_trained for part in parts))
            total = float(sum(part.numel for part in parts))
        else:
            sums = torch.zeros(2, dtype=torch.float64)
            for each in self._sums.values():
                sums += each.cpu()  # waits for the device, once
            chosen, total = ranks.sum_(sums).tolist()
        if chosen:
            self.share = chosen / total
            self._sums.clear()

    @contextmanager
    def measured_anew(self) -> Iterator[None]:
        """Measure the share by the gradients that are added inside; without any, the share stays."""
        before, self.share = self.share, None
        self._sums.clear()
        try:
            yield
        finally:
            if self.share is None:
                self.share = before
                self._sums.clear()

    def forget(self) -> None:
        """Measure the share anew by the gradients that are added from now on; the choice has moved."""
        self.share = None
        self.has_moved = True
        self._sums.clear()

    def scale(self, optimizer: Optimizer) -> None:
        """Divide the learning rates of sparsely trained parameters by the share, until ``restore``.

        A parameter group that also holds other parameters is two groups meanwhile.
        """
        self.restore()  # a step that raised an error has not restored them
        if self.share is None:
            return
        groups = []
        for group in optimizer.param_groups:
            sparse = [master for master in group["params"] if id(master) in self._masters]
            rest = [master for master in group["params"] if id(master) not in self._masters]
            if sparse and rest:
                groups.append({**group, "params": rest})
            if sparse:
                own = {**group, "params": sparse} if rest else group
                groups.append(own)
                self._stated.append((own, group, group["lr"]))
                own["lr"] = self.sparse(group["lr"])
            else:
                groups.append(group)
        self._groups = optimizer, list(optimizer.param_groups)
        optimizer.param_groups[:] = groups
        if self._stated and not self._is_logged:
            self._is_logged = True
            logger.info(
                "the trained components hold %.4g of the sum of |gradient|, so lr_transfer raises the"
                " learning rate of sparsely trained parameters from %.4g to %.4g at this step",
                self.share,
                float(self._stated[0][2]),
                float(self._stated[0][0]["lr"]),
            )
            if isinstance(optimizer, SGD) and self.share < 1:
                logger.warning(
                    "lr_transfer raises the learning rate by the share of the gradient, which suits AdamW and its relatives;"
                    " with SGD give lr_transfer=False and SGD's own learning rate"
                )

    def sparse(self, lr: Any) -> Any:
        """Return the learning rate of sparsely trained parameters for a stated one."""
        return lr if self.share is None else lr / self.share

    def restore(self) -> None:
        """Restore the groups and their learning rates, after a step."""
        for own, group, stated in self._stated:
            changed = {key: value for key, value in own.items() if key not in ("params", "lr")}
            group.update(changed, lr=stated)  # some optimizers count their steps in the group
        self._stated.clear()
        if self._groups is not None:
            optimizer, groups = self._groups
            optimizer.param_groups[:] = groups
            self._groups = None


def _sum(values: Tensor) -> Tensor:
    """Return the sum of |finite values|, in fp64 where the device has it; without a copy of all values."""
    wide = torch.float32 if values.device.type == "mps" else torch.float64
    total = torch.zeros((), dtype=wide, device=values.device)
    for part in slices_of(values.reshape(-1)) if values.numel() else ():
        total += finite_or_zero(part).abs_().sum(dtype=wide)
    return total

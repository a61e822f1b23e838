"""``Synchronizer``: keeps the choice and the masters of one SIFT equal on all ranks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sift_train.masters import SparseParameter
from sift_train.ranks.buckets import DTYPES, average_gradients
from sift_train.ranks.digest import first_difference
from sift_train.ranks.group import ALONE, Ranks, find_ranks
from sift_train.ranks.shard import is_sharded
from sift_train.ranks.wrapped import (
    refuse_inside_ddp,
    refuse_returned_gradients,
    refuse_sharded_later,
)

CHECK_EVERY = 100  # steps between comparisons of all masters


class Synchronizer:
    """Averages gradients over ranks before each step, and compares the ranks at intervals.

    Args:
        model: the model that is trained.
        parts: its parts by name.
        group: the process group; None: all processes, if torch.distributed connects several.
        dtype: dtype in which gradients are sent; None: the masters' dtype.

    Raises:
        ValueError: gradients cannot be sent in this dtype.
    """

    def __init__(
        self,
        model: nn.Module,
        parts: Mapping[str, SparseParameter],
        group: dist.ProcessGroup | None,
        dtype: torch.dtype | None,
    ) -> None:
        if dtype is not None and dtype not in DTYPES:
            known = ", ".join(str(each) for each in DTYPES)
            raise ValueError(f"reduce_dtype is {dtype}; choose one of {known}")
        if group is not None and not isinstance(group, dist.ProcessGroup):
            raise TypeError(
                f"process_group is of type {type(group).__name__}, expected a process group, as"
                " torch.distributed.new_group() returns"
            )
        self._model = model
        self._parts = parts
        self._group = group
        self._dtype = dtype
        self._ranks = ALONE
        self._n_steps = 0
        self._has_new_gradients = False
        self._is_averaged = False

    @property
    def ranks(self) -> Ranks:
        """The ranks; they are looked up until several are found.

        Raises:
            ValueError: several processes were started, but nothing connects them.
        """
        if self._ranks.size == 1:
            self._ranks = find_ranks(self._group)
        return self._ranks

    def before_forward(self) -> None:
        """Check that nothing else distributes the model.

        Raises:
            ValueError: something does.
        """
        refuse_inside_ddp(self._model)
        if self._n_steps == 0:
            refuse_sharded_later(self._model, (p.parameter for p in self._parts.values()))

    def note_gradient(self) -> None:
        """Record that a gradient of this rank was added."""
        self._has_new_gradients, self._is_averaged = True, False

    def average(self, weight: float | None = None) -> None:
        """Average the gradients, unless that has been done since the last backward pass."""
        if self.ranks.size == 1 or self._is_averaged:
            return
        if self._n_steps == 0:
            self._check_first_weights()
        refuse_returned_gradients(part.parameter for part in self._parts.values())
        whole = [part for part in self._parts.values() if part.shard is None]
        average_gradients(whole, self.ranks, dtype=self._dtype, weight=weight)
        self._has_new_gradients, self._is_averaged = False, True

    def after_step(self) -> None:
        """Count a step, and compare the ranks at intervals."""
        self._is_averaged = self._has_new_gradients = False
        self._n_steps += 1
        if self._n_steps % CHECK_EVERY == 0 or self._n_steps == 1:
            self.check()

    def check(self) -> None:
        """Compare the choice and the masters of all ranks.

        Raises:
            RuntimeError: they differ.
        """
        if self.ranks.size == 1:
            return
        held: dict[str, Tensor] = {"the number of steps": torch.tensor([self._n_steps])}
        for name, part in self._parts.items():
            if part.shard is not None:
                continue  # each rank has another part
            if part.is_selected and not part.trains_all:
                held[f"the choice of {name!r}"] = part.flat_index
            held[f"the master of {name!r}"] = part.data
        found = first_difference(held, self.ranks)
        if found is not None:
            raise RuntimeError(
                f"{found} differs between the ranks of this run after {self._n_steps} steps on rank"
                f" {self.ranks.rank}; every rank must make the same steps, so resume from a checkpoint"
            )

    def refuse_step_without_average(self) -> None:
        """Raise if masters were changed by gradients of this rank alone.

        Raises:
            ValueError: they were.
        """
        if self._has_new_gradients and self.ranks.size > 1:
            raise ValueError(
                "the masters were changed by gradients of this rank alone; call sift.sync_gradients()"
                " before the step of an optimizer that is not torch's"
            )

    def _check_first_weights(self) -> None:
        for name, part in self._parts.items():
            if part.shard is not None and part.shard.n_ranks != self.ranks.size:
                raise ValueError(
                    f"parameter {name!r} is sharded over {part.shard.n_ranks} of {self.ranks.size} ranks;"
                    " shard it over all, for example with a replicated dimension of the mesh"
                )
        whole = {n: p for n, p in self._model.named_parameters() if not is_sharded(p)}
        found = first_difference(whole, self.ranks)
        if found is not None:
            raise ValueError(
                f"{found!r} differs between the ranks before the first step; load the same weights on all"
                " ranks, and set the same seed before new layers are added"
            )

"""``SiftConfig``: which components of a model are trained, apart from any model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Any, Self

from torch import nn

from sift_train.chooser import BUDGETS
from sift_train.known import check_integer, settings_checked
from sift_train.lean import check_masters
from sift_train.reselection import Reselection, find_reselection
from sift_train.rules import Selection, find_rule
from sift_train.selection import n_selected
from sift_train.sift import SIFT
from sift_train.structure import Block, check_block
from sift_train.targets import ALL_LINEAR, Names
from sift_train.yaml_files import (
    check_types,
    lists_to_tuples,
    read_settings,
    write_yaml,
)


@settings_checked
@dataclass(frozen=True, kw_only=True)
class SiftConfig:
    """The settings of a ``SIFT``; ``SiftTrainerMixin`` builds the SIFT from them.

    Attributes:
        sparse_rate, sparse_module, exception, selection, budget, block, seed, lr_transfer: as for ``SIFT``.
        masters, masters_device: as for ``SIFT``.
        selection_batches: number of micro-batches of the train loader whose gradients choose the
            components before the first step. None: those of the first step choose.
        reselection: when and how the choice moves, as for ``FitConfig``. ``SiftTrainerMixin`` does it, by
            ``selection_batches`` micro-batches (4 if that is None). In a loop of your own, call ``SIFT.reselecting``.
        gradient_checkpointing: as for ``SIFT``. The training arguments of a Trainer have their own.

    Raises:
        ValueError: a setting is out of range.
    """

    sparse_rate: float = 0.01
    sparse_module: Names = ALL_LINEAR
    exception: Names = ()
    selection: Selection = "random"
    selection_batches: int | None = None
    budget: str = "tensor"
    block: Block | None = None
    reselection: Reselection | Mapping[str, Any] | str | None = None
    gradient_checkpointing: bool = False
    seed: int = 0
    lr_transfer: bool = True
    masters: str = "fp32"
    masters_device: str = "model"

    def __post_init__(self) -> None:
        lists_to_tuples(self)
        check_types(self)
        n_selected(1, self.sparse_rate)
        find_rule(self.selection)
        check_masters(self.masters, self.masters_device)
        object.__setattr__(self, "reselection", find_reselection(self.reselection))
        if self.budget not in BUDGETS:
            raise ValueError(f"budget is {self.budget!r}; choose one of {', '.join(BUDGETS)}")
        check_block(self.block)
        if self.selection_batches is not None:
            check_integer("selection_batches", self.selection_batches, least=1)

    @classmethod
    def from_yaml(cls, path: str | PathLike[str]) -> Self:
        """Return the settings in a YAML file.

        Raises:
            ValueError: the file is not YAML, a setting is not known, or a value is out of range.
        """
        return read_settings(cls, path)

    def to_yaml(self, path: str | PathLike[str]) -> None:
        """Write all settings as a YAML file.

        Raises:
            ValueError: ``selection`` is a function, a ``Rule``, a mapping or a delta.
        """
        write_yaml(self, path)

    def build(self, model: nn.Module, *, grad_acc: int = 1) -> SIFT:
        """Return the SIFT of a model.

        Args:
            model: a module without wrappers for several devices.
            grad_acc: micro-batches per optimizer step.

        Raises:
            ValueError: as ``SIFT``.
        """
        return SIFT(
            model,
            self.sparse_rate,
            self.sparse_module,
            self.exception,
            grad_acc,
            self.gradient_checkpointing,
            selection=self.selection,
            budget=self.budget,
            block=self.block,
            seed=self.seed,
            lr_transfer=self.lr_transfer,
            masters=self.masters,
            masters_device=self.masters_device,
        )

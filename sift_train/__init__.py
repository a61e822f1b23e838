"""Sparse fine-tuning in place, with a delta as its result.

    result = sift_train.fit("base/", batches, output="delta.sd")

or, in a loop of one's own, ``SIFT(model, ...)`` and ``export_delta``; with ``transformers.Trainer``,
``SiftCallback`` or ``SiftTrainerMixin``. ``plan`` says beforehand what fits in memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sift_train.config import Evaluation, FitConfig, FitResult, StepReport
from sift_train.export import export_delta
from sift_train.fit import fit
from sift_train.groups import grouped_parameters
from sift_train.masters import SparseParameter
from sift_train.memory import MemoryReport, Plan, plan
from sift_train.rules import RULES, Rule, principal
from sift_train.sift import SIFT

if TYPE_CHECKING:
    from sift_train.trainer import SiftCallback, SiftTrainerMixin

__all__ = [
    "RULES",
    "SIFT",
    "Evaluation",
    "FitConfig",
    "FitResult",
    "MemoryReport",
    "Plan",
    "Rule",
    "SiftCallback",
    "SiftTrainerMixin",
    "SparseParameter",
    "StepReport",
    "export_delta",
    "fit",
    "grouped_parameters",
    "plan",
    "principal",
]


def __getattr__(name: str) -> Any:
    # transformers takes seconds to import, and only these two need it.
    if name in ("SiftCallback", "SiftTrainerMixin"):
        from sift_train import trainer

        return getattr(trainer, name)
    raise AttributeError(f"module 'sift_train' has no attribute {name!r}")

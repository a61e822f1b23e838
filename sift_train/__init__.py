"""Sparse fine-tuning of a model in place; the result is a delta.

    result = sift_train.fit("base/", batches, output="delta.sd")

In your own training loop, use ``SIFT(model, ...)`` and ``export_delta``. With
``transformers.Trainer``, use ``SiftTrainerMixin`` or ``SiftCallback``. ``plan`` computes the memory
that training will need.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sift_train import _extra  # noqa: F401 - names a package that is missing
from sift_train.config import Evaluation, FitConfig, FitResult, StepReport
from sift_train.export import export_delta
from sift_train.fit import fit
from sift_train.groups import grouped_parameters
from sift_train.masks import intersect, load_mask, mask_of_delta, save_mask, unite
from sift_train.masters import SparseParameter
from sift_train.memory import MemoryReport, Plan, plan
from sift_train.model import from_pretrained, get_sift_model
from sift_train.ranks.checkpoint import load_sharded, save_sharded
from sift_train.reselection import Reselection
from sift_train.rules import RULES, Rule, principal
from sift_train.sift import SIFT
from sift_train.sift_config import SiftConfig

if TYPE_CHECKING:
    from sift_train.publish_callback import PublishCallback
    from sift_train.trainer import SiftCallback, SiftTrainerMixin

__all__ = [
    "RULES",
    "SIFT",
    "Evaluation",
    "FitConfig",
    "FitResult",
    "MemoryReport",
    "Plan",
    "PublishCallback",
    "Reselection",
    "Rule",
    "SiftCallback",
    "SiftConfig",
    "SiftTrainerMixin",
    "SparseParameter",
    "StepReport",
    "export_delta",
    "fit",
    "from_pretrained",
    "get_sift_model",
    "grouped_parameters",
    "intersect",
    "load_mask",
    "load_sharded",
    "mask_of_delta",
    "plan",
    "principal",
    "save_mask",
    "save_sharded",
    "unite",
]


def __getattr__(name: str) -> Any:
    # transformers takes seconds to import, and only these need it.
    if name in ("SiftCallback", "SiftTrainerMixin"):
        from sift_train import trainer

        return getattr(trainer, name)
    if name == "PublishCallback":
        from sift_train.publish_callback import PublishCallback

        return PublishCallback
    raise AttributeError(f"module 'sift_train' has no attribute {name!r}")

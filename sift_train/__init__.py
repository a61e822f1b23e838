"""Sparse fine-tuning in place, with a delta as its result.

    result = sift_train.fit("base/", batches, output="delta.sd")

or, in a loop of one's own, ``SIFT(model, ...)`` and ``export_delta``.
"""

from sift_train.config import FitConfig, FitResult, StepReport
from sift_train.export import export_delta
from sift_train.fit import fit
from sift_train.masters import SparseParameter
from sift_train.rules import RULES, Rule
from sift_train.sift import SIFT

__all__ = [
    "RULES",
    "SIFT",
    "FitConfig",
    "FitResult",
    "Rule",
    "SparseParameter",
    "StepReport",
    "export_delta",
    "fit",
]

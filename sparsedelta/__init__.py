"""Sparse deltas of model checkpoints: keep only what changed, exactly.

delta = sparsedelta.diff("base/", "target/")
delta.save("delta.sd")
sparsedelta.apply("base/", "delta.sd", "out/")   # out/ is target/, byte for byte
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparsedelta._apply import apply
    from sparsedelta._diff import diff
    from sparsedelta._inspect import Inspection, inspect
    from sparsedelta._invert import invert
    from sparsedelta._merge import merge
    from sparsedelta._stack import stack
    from sparsedelta._verify import VerifyReport, verify
    from sparsedelta.container import load
    from sparsedelta.delta import Delta
    from sparsedelta.errors import SparseDeltaError
    from sparsedelta.hub.pull import PullReport, pull
    from sparsedelta.hub.push import PushReport, push
    from sparsedelta.live.bank import DeltaBank
    from sparsedelta.live.loading import load_model

__version__ = "0.1.0"

__all__ = [
    "Delta",
    "DeltaBank",
    "Inspection",
    "PullReport",
    "PushReport",
    "SparseDeltaError",
    "VerifyReport",
    "__version__",
    "apply",
    "diff",
    "inspect",
    "invert",
    "load",
    "load_model",
    "merge",
    "pull",
    "push",
    "stack",
    "verify",
]

# The verbs live in private modules: a module `diff` would take the place of the function `diff`.
_HOMES = {
    "Delta": "delta",
    "DeltaBank": "live.bank",
    "Inspection": "_inspect",
    "PullReport": "hub.pull",
    "PushReport": "hub.push",
    "SparseDeltaError": "errors",
    "VerifyReport": "_verify",
    "apply": "_apply",
    "diff": "_diff",
    "inspect": "_inspect",
    "invert": "_invert",
    "load": "container",
    "load_model": "live.loading",
    "merge": "_merge",
    "pull": "hub.pull",
    "push": "hub.push",
    "stack": "_stack",
    "verify": "_verify",
}


def __getattr__(name: str) -> Any:
    # Public names are imported when first used: `sparsedelta --help` needs none of them.
    if name not in _HOMES:
        raise AttributeError(f"module 'sparsedelta' has no attribute {name!r}")
    value = getattr(import_module(f"sparsedelta.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)

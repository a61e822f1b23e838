"""Exact sparse deltas of model checkpoints: a delta holds only the elements that changed.

delta = sparsedelta.diff("base/", "target/")
delta.save("delta.sd")
sparsedelta.apply("base/", "delta.sd", "out/")   # out/ is target/, byte for byte
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparsedelta.channel.channel import Channel
    from sparsedelta.channel.follower import Follower
    from sparsedelta.channel.publisher import Publisher
    from sparsedelta.errors import SparseDeltaError
    from sparsedelta.format.delta import Delta, load
    from sparsedelta.hub.load_model import load_model
    from sparsedelta.hub.pull import PullReport, pull
    from sparsedelta.hub.push import PushReport, push
    from sparsedelta.interop.conversion import ConvertReport, convert
    from sparsedelta.interop.masks import read_mask
    from sparsedelta.live.bank import DeltaBank
    from sparsedelta.live.snapshot import Snapshot
    from sparsedelta.ops.apply import apply
    from sparsedelta.ops.diff import diff
    from sparsedelta.ops.inspect import Inspection, inspect
    from sparsedelta.ops.invert import invert
    from sparsedelta.ops.merge import merge
    from sparsedelta.ops.stack import stack
    from sparsedelta.ops.verify import VerifyReport, verify

__version__ = "0.1.0"

__all__ = [
    "Channel",
    "ConvertReport",
    "Delta",
    "DeltaBank",
    "Follower",
    "Inspection",
    "Publisher",
    "PullReport",
    "PushReport",
    "Snapshot",
    "SparseDeltaError",
    "VerifyReport",
    "__version__",
    "apply",
    "convert",
    "diff",
    "inspect",
    "invert",
    "load",
    "load_model",
    "merge",
    "pull",
    "push",
    "read_mask",
    "stack",
    "verify",
]

# The module that defines each public name. No module here is named like a verb: importing a module
# `sparsedelta.diff` would replace the function of that name.
_MODULES = {
    "Channel": "channel.channel",
    "ConvertReport": "interop.conversion",
    "Delta": "format.delta",
    "DeltaBank": "live.bank",
    "Follower": "channel.follower",
    "Inspection": "ops.inspect",
    "Publisher": "channel.publisher",
    "PullReport": "hub.pull",
    "PushReport": "hub.push",
    "Snapshot": "live.snapshot",
    "SparseDeltaError": "errors",
    "VerifyReport": "ops.verify",
    "apply": "ops.apply",
    "convert": "interop.conversion",
    "diff": "ops.diff",
    "inspect": "ops.inspect",
    "invert": "ops.invert",
    "load": "format.delta",
    "load_model": "hub.load_model",
    "merge": "ops.merge",
    "pull": "hub.pull",
    "push": "hub.push",
    "read_mask": "interop.masks",
    "stack": "ops.stack",
    "verify": "ops.verify",
}


def __getattr__(name: str) -> Any:
    # Public names are imported on first use, so that `sparsedelta --help` starts fast.
    if name not in _MODULES:
        raise AttributeError(f"module 'sparsedelta' has no attribute {name!r}")
    value = getattr(import_module(f"sparsedelta.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)

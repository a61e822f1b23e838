"""Makes the ``SparseParameter`` of each parameter that a SIFT trains."""

from __future__ import annotations

from torch import nn

from sift_train.lean import Lean, Rounding, check_masters
from sift_train.masters import SparseParameter
from sift_train.ranks.shard import is_sharded
from sift_train.structure import Block
from sift_train.targets import Names, Target, find_targets


def trained_parts(
    model: nn.Module,
    rate: float,
    sparse_module: Names,
    exception: Names,
    *,
    budget: str,
    block: Block | None,
    masters: str,
    masters_device: str,
    rounding: Rounding,
) -> list[SparseParameter]:
    """Return the parts of a model, none chosen yet; the arguments are those of ``SIFT``.

    Raises:
        ValueError: an argument is out of range, or a parameter cannot be trained so.
    """
    check_masters(masters, masters_device)
    return [
        SparseParameter(
            target.name,
            target.parameter,
            target.n_trained(rate, budget, block),
            is_dense=target.dense,
            n_matrices=target.n_matrices,
            lean=_lean(masters, target, rounding),
            is_on_host=_is_on_host(masters_device, target),
        )
        for target in find_targets(model, sparse_module, exception)
    ]


def _lean(masters: str, target: Target, rounding: Rounding) -> Lean | None:
    if masters == "fp32":
        return None
    if is_sharded(target.parameter):
        raise ValueError(
            f"masters is {masters!r}, but parameter {target.name!r} is sharded; use 'fp32' with shards"
        )
    return Lean(masters, target.name, target.parameter, rounding)


def _is_on_host(masters_device: str, target: Target) -> bool:
    if masters_device == "model":
        return False
    if is_sharded(target.parameter):
        raise ValueError(
            f"masters_device is {masters_device!r}, but parameter {target.name!r} is sharded; use 'model' with shards"
        )
    return True

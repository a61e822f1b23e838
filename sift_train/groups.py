"""Sorts the masters into an optimizer's parameter groups, with and without weight decay.

The optimizer does weight decay toward zero. SIFT does weight decay toward the base: before each
step it moves a master toward its original by the share lr x weight_decay. For AdamW this equals its
own decoupled decay plus lr x weight_decay x original.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sift_train.sift import SIFT

BASE_DECAY = "base_decay"
DECAYS = ("zero", "base")


def grouped_parameters(
    sift: SIFT, weight_decay: float, *, decay_to: str = "zero"
) -> list[dict[str, Any]]:
    """Return optimizer groups; only parameters of two or more dimensions have weight decay.

    Args:
        sift: the SIFT whose masters are grouped.
        weight_decay: each step moves a weight toward ``decay_to`` by the share lr x weight_decay.
        decay_to: ``"zero"``, or ``"base"``: the weights with which the training began.

    Raises:
        ValueError: ``decay_to`` has another value.
    """
    if decay_to not in DECAYS:
        raise ValueError(f"decay_to is {decay_to!r}; choose one of {', '.join(DECAYS)}")
    to_base = weight_decay if decay_to == "base" else 0.0
    parts = sift.sparse_mapping.values()
    matrices = [part.master for part in parts if part.parameter.dim() > 1]
    vectors = [part.master for part in parts if part.parameter.dim() <= 1]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": weight_decay - to_base, BASE_DECAY: to_base},
        {"params": vectors, "weight_decay": 0.0, BASE_DECAY: 0.0},
    ]
    return [group for group in groups if group["params"]]


def lr_info(sift: SIFT, lr: float | None = None) -> dict[str, dict[str, float]]:
    """Return what a delta's info says about ``lr_transfer``: the share and, if given, both learning rates.

    Args:
        sift: the SIFT.
        lr: the stated learning rate.
    """
    if not sift.lr_transfer or sift.lr_share is None:
        return {}
    rates = {} if lr is None else {"lr": lr, "sparse_lr": sift.sparse_lr(lr)}
    return {"lr_transfer": {**rates, "share": sift.lr_share}}

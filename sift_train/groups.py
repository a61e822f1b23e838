"""The masters as an optimizer's groups: who decays, and toward what.

Weight decay toward zero is the optimizer's own. Toward the base it is ours: before each step a
master moves toward its original by lr x decay of the way, which for AdamW is the same as adding
lr x decay x original to its decoupled decay.
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
    """Return optimizer groups: weight decay on matrices and up, none on 1-D parameters.

    Args:
        sift: whose masters are grouped.
        weight_decay: times the learning rate, the share of the way that a step takes.
        decay_to: ``"zero"``, or ``"base"``: the weights that the training began with.

    Raises:
        ValueError: ``decay_to`` is neither.
    """
    if decay_to not in DECAYS:
        raise ValueError(f"decay_to is {decay_to!r}; choose one of {', '.join(DECAYS)}")
    parts = list(sift.sparse_mapping.values())
    matrices = [part.master for part in parts if part.parameter.dim() > 1]
    vectors = [part.master for part in parts if part.parameter.dim() <= 1]
    to_base = weight_decay if decay_to == "base" else 0.0
    groups = [
        {"params": matrices, "weight_decay": weight_decay - to_base, BASE_DECAY: to_base},
        {"params": vectors, "weight_decay": 0.0, BASE_DECAY: 0.0},
    ]
    return [group for group in groups if group["params"]]

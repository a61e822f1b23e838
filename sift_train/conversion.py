"""Parameters as transformers saves them, where a checkpoint has them otherwise than the module, such as fused experts."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import Tensor, nn


def groups_of(names: Collection[str]) -> list[set[str]]:
    """Return names of parameters by the module they belong to: what is saved together is of one module."""
    groups: dict[str, set[str]] = defaultdict(set)
    for name in names:
        groups[name.rpartition(".")[0]].add(name)
    return [groups[place] for place in sorted(groups)]


def as_saved(model: nn.Module, group: Mapping[str, Callable[[], Tensor]]) -> dict[str, Tensor]:
    """Return what transformers saves of some parameters of a model, by the names in a checkpoint.

    Args:
        model: of transformers, else nothing is converted.
        group: for each parameter a function that returns its values.

    Returns:
        Nothing if transformers converts none of these, or cannot without the model's others.
    """
    transformers: Any = sys.modules.get("transformers")  # loaded, or the model is not one of its
    if transformers is None or not isinstance(model, transformers.PreTrainedModel):
        return {}
    from transformers.core_model_loading import revert_weight_conversion

    revert: Any = revert_weight_conversion
    try:
        made: dict[str, Tensor] = revert(model, {name: value() for name, value in group.items()})
    except (
        Exception
    ):  # whatever a conversion does that lacks a tensor; the caller says what is left
        return {}
    return {} if made.keys() == group.keys() else made

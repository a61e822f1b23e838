"""Activation checkpointing of transformers models, always non-reentrant.

Frozen embeddings hand the first layer inputs that need no gradient; reentrant checkpointing would
then compute no gradient at all.
"""

from __future__ import annotations

from typing import Any

from torch import nn


def enable_checkpointing(model: Any) -> bool:
    """Switch checkpointing on; return whether it was off before.

    Raises:
        ValueError: the model has no switch for it.
    """
    was_on = _is_checkpointing(model)
    kwargs = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs)
    elif hasattr(model, "gradient_checkpointing_enable"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
    else:
        raise ValueError(
            f"{type(model).__name__} cannot switch checkpointing on by itself; "
            "leave gradient_checkpointing off and checkpoint inside its forward"
        )
    return not was_on


def disable_checkpointing(model: nn.Module) -> None:
    """Switch checkpointing off on a model that ``enable_checkpointing`` accepted."""
    for name in ("activation_checkpointing_disable", "gradient_checkpointing_disable"):
        if hasattr(model, name):
            getattr(model, name)()
            return


def _is_checkpointing(model: nn.Module) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())

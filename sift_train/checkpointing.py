"""Switches activation checkpointing of transformers models on and off; always non-reentrant.

With frozen embeddings the inputs of the first layer need no gradient, and reentrant checkpointing
would then compute no gradients at all.
"""

from __future__ import annotations

from typing import Any

from torch import nn


def enable_checkpointing(model: Any) -> bool:
    """Switch checkpointing on; return True if it was off before.

    Raises:
        ValueError: the model has no method for it.
    """
    was_on = _is_checkpointing(model)
    kwargs = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs)
    elif hasattr(model, "gradient_checkpointing_enable"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
    else:
        raise ValueError(
            f"{type(model).__name__} has no method gradient_checkpointing_enable; "
            "leave gradient_checkpointing off, and use checkpointing inside the model's forward"
        )
    return not was_on


def disable_checkpointing(model: nn.Module) -> None:
    """Switch checkpointing off; the model must be one that ``enable_checkpointing`` accepts."""
    for name in ("activation_checkpointing_disable", "gradient_checkpointing_disable"):
        if hasattr(model, name):
            getattr(model, name)()
            return


def _is_checkpointing(model: nn.Module) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())

"""Has a model's ``zero_grad`` drop the gradients of the masters, which are none of its parameters.

Training loops, ``transformers.Trainer`` among them, drop gradients through the model.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn

_NAME = "zero_grad"


class _ZeroGrad:
    """Stands in for a model's own method."""

    def __init__(self, model: nn.Module, also: Callable[[], None]) -> None:
        self._model = model
        self._also = also

    def __call__(self, set_to_none: bool = True) -> None:
        type(self._model).zero_grad(self._model, set_to_none)
        self._also()

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        # A copied model is nobody's to train: it gets its own method back.
        model = memo.get(id(self._model), self._model)
        return MethodType(type(model).zero_grad, model)


def zero_with(model: nn.Module, also: Callable[[], None]) -> None:
    """Call ``also`` whenever the model's ``zero_grad`` is called."""
    vars(model)[_NAME] = _ZeroGrad(model, also)


def zero_without(model: nn.Module) -> None:
    """Give the model its own ``zero_grad`` back."""
    if isinstance(vars(model).get(_NAME), _ZeroGrad):
        del vars(model)[_NAME]

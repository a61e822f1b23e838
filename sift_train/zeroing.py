"""Extends a model's ``zero_grad`` so that it also drops the gradients of the masters.

The masters are not parameters of the model, but training loops, such as ``transformers.Trainer``,
call ``model.zero_grad()``.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn

_NAME = "zero_grad"


class _ZeroGrad:
    """Replaces a model's method ``zero_grad``."""

    def __init__(self, model: nn.Module, also: Callable[[], None]) -> None:
        self._model = model
        self._also = also

    def __call__(self, set_to_none: bool = True) -> None:
        type(self._model).zero_grad(self._model, set_to_none)
        self._also()

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        # No SIFT trains the copy of a model, so the copy gets the original method.
        return _own_zero_grad(memo.get(id(self._model), self._model))

    def __reduce__(self) -> tuple[Any, ...]:
        return _own_zero_grad, (self._model,)


def _own_zero_grad(model: nn.Module) -> Callable[..., None]:
    return MethodType(type(model).zero_grad, model)


def extend_zero_grad(model: nn.Module, also: Callable[[], None]) -> None:
    """Make the model's ``zero_grad`` call ``also`` too."""
    vars(model)[_NAME] = _ZeroGrad(model, also)


def restore_zero_grad(model: nn.Module) -> None:
    """Restore the model's original ``zero_grad``."""
    if isinstance(vars(model).get(_NAME), _ZeroGrad):
        del vars(model)[_NAME]

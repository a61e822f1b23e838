"""Tells whoever trains masters of every optimizer step in this process, before and after.

The two hooks on all optimizers are set when this is imported and stay: taking one away, as the garbage collector
might in the middle of a step, breaks that step. They hold listeners weakly and cost nothing
without any.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, Protocol
from weakref import WeakSet

from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)


class StepListener(Protocol):
    """Told of steps."""

    def before_step(self, optimizer: Optimizer) -> None:
        """An optimizer is about to step."""

    def after_closure(self, optimizer: Optimizer) -> None:
        """A closure that an optimizer steps with has computed gradients."""

    def after_step(self, optimizer: Optimizer) -> None:
        """An optimizer has stepped; it has not if a gradient scaler skipped it."""


_listeners: WeakSet[Any] = WeakSet()


def listen(listener: StepListener) -> None:
    """Tell a listener of all steps until ``silence`` or its end."""
    _listeners.add(listener)


def silence(listener: StepListener) -> None:
    """Tell a listener no more."""
    _listeners.discard(listener)


def listening() -> list[Any]:
    """Return the listeners there are."""
    return list(_listeners)


def _before(
    optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    for listener in list(_listeners):
        listener.before_step(optimizer)
    if not _listeners:
        return None
    # A closure is the first argument of `step`; the optimizer itself stands before it.
    if kwargs.get("closure") is not None:
        return args, {**kwargs, "closure": _told(optimizer, kwargs["closure"])}
    if len(args) > 1 and callable(args[1]):
        return (args[0], _told(optimizer, args[1]), *args[2:]), kwargs
    return None


def _told(optimizer: Optimizer, closure: Callable[[], Any]) -> Callable[[], Any]:
    @wraps(closure)
    def run() -> Any:
        loss = closure()
        for listener in list(_listeners):
            listener.after_closure(optimizer)
        return loss

    return run


def _after(optimizer: Optimizer, *_: Any) -> None:
    for listener in list(_listeners):
        listener.after_step(optimizer)


register_optimizer_step_pre_hook(_before)
register_optimizer_step_post_hook(_after)

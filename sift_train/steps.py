"""Calls listeners before and after every step of every torch optimizer in this process.

Importing this module registers two global optimizer hooks, which are never removed: removing a hook
during a step, as the garbage collector could, would break that step. The hooks hold listeners by
weak references.
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
    """An object whose methods are called at each optimizer step."""

    def before_step(self, optimizer: Optimizer) -> None:
        """Called before an optimizer steps."""

    def after_closure(self, optimizer: Optimizer) -> None:
        """Called when the closure passed to a step has computed gradients."""

    def after_step(self, optimizer: Optimizer) -> None:
        """Called after an optimizer has stepped, but not if a gradient scaler skipped the step."""


_listeners: WeakSet[Any] = WeakSet()


def add_listener(listener: StepListener) -> None:
    """Call a listener at all steps, until it is removed or garbage-collected."""
    _listeners.add(listener)


def remove_listener(listener: StepListener) -> None:
    """Stop calling a listener."""
    _listeners.discard(listener)


def current_listeners() -> list[Any]:
    """Return all listeners."""
    return list(_listeners)


def _before(
    optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    for listener in list(_listeners):
        listener.before_step(optimizer)
    if not _listeners:
        return None
    # args[0] is the optimizer; a closure is the first argument of `step`.
    if kwargs.get("closure") is not None:
        return args, {**kwargs, "closure": _with_report(optimizer, kwargs["closure"])}
    if len(args) > 1 and callable(args[1]):
        return (args[0], _with_report(optimizer, args[1]), *args[2:]), kwargs
    return None


def _with_report(optimizer: Optimizer, closure: Callable[[], Any]) -> Callable[[], Any]:
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

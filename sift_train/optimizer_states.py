"""The states that an optimizer keeps for masters, moved with the components of these masters.

An elementwise optimizer keeps tensors of the master's shape, and numbers for the whole master.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

_FIRST_MOMENTS = ("exp_avg", "momentum_buffer", "state1")


def unwrapped(optimizer: Any) -> Optimizer:
    """Return the optimizer inside the wrappers of accelerate; they hold it as ``optimizer``."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    found: Optimizer = optimizer
    return found


def check_states(optimizer: Optimizer, masters: Iterable[nn.Parameter]) -> None:
    """Check that the states can move with single components.

    Raises:
        ValueError: a state is neither one number nor a floating tensor of the master's shape.
    """
    for master in masters:
        for name, value in optimizer.state.get(master, {}).items():
            if not _is_number(value) and not _is_elementwise(value, master):
                raise ValueError(
                    f"the state {name!r} of {type(optimizer).__name__} has no value of its own for each component, as"
                    " 8-bit states and those of LBFGS, so it cannot follow a re-selection; use an optimizer such as"
                    " AdamW or SGD"
                )


def move_states(
    optimizer: Optimizer, master: nn.Parameter, n_before: int, carry: Callable[[Tensor], Tensor]
) -> None:
    """Replace each state of a master's components by what ``carry`` returns for it.

    Args:
        optimizer: the optimizer, which ``check_states`` accepted.
        master: the master.
        n_before: the number of its components before.
        carry: a function of a tensor, shape (n_before,).
    """
    state = optimizer.state.get(master, {})
    for name, value in state.items():
        if isinstance(value, Tensor) and value.dim() == 1 and len(value) == n_before:
            state[name] = carry(value)


def first_moment(optimizer: Optimizer, master: nn.Parameter) -> Tensor:
    """Return the first moment of a master, shape (k,).

    Raises:
        ValueError: the optimizer keeps none, or has not stepped yet.
    """
    state = optimizer.state.get(master, {})
    for name in _FIRST_MOMENTS:
        value = state.get(name)
        if isinstance(value, Tensor) and _is_elementwise(value, master):
            return value
    raise ValueError(
        f"drop is 'moment', but {type(optimizer).__name__} has no first moment of the masters; choose another rule, such"
        " as 'change'"
    )


def _is_number(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.dim() == 0
    return value is None or isinstance(value, bool | int | float)


def _is_elementwise(value: Any, master: nn.Parameter) -> bool:
    # Subclasses of Tensor, such as the quantized states of torchao, have scales for blocks of components.
    return type(value) is Tensor and value.shape == master.shape and value.is_floating_point()

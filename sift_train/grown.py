"""Adam's bias correction for components that a re-selection has grown.

Adam divides its moments by 1 - beta^t. It counts the steps t for a whole tensor, but the moments of a grown component start
at zero when t is large: its updates would be up to six times too large. So each step is followed by a correction of the
masters, after which grown components are where their own counts of steps lead. The moments are not changed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer

GROWN_AT = "grown_at"  # in the optimizer's state, so that it is saved and restored with it


def note_growth(
    optimizer: Optimizer, master: nn.Parameter, n_before: int, carry: Callable[[Tensor], Tensor]
) -> None:
    """Record when components of a master were grown, if the optimizer is Adam or AdamW and has stepped it.

    ``move_states`` must have moved the states, of which the record is one.

    Args:
        optimizer: the optimizer.
        master: the master; its components have moved.
        n_before: the number of its components before.
        carry: a function of a tensor, shape (n_before,), that returns it for the new components, 0 for grown ones.
    """
    state = optimizer.state.get(master, {})
    if type(optimizer) not in (Adam, AdamW) or "step" not in state:
        return
    is_grown = carry(torch.ones(n_before, device=master.device)) == 0
    earlier = state.get(GROWN_AT, torch.zeros(len(master), device=master.device))
    state[GROWN_AT] = torch.where(is_grown, float(state["step"]), earlier)


def correct_grown(optimizer: Optimizer, group: dict[str, Any], master: nn.Parameter) -> None:
    """Change a master that Adam or AdamW has just stepped as if each grown component had its own count of steps.

    Args:
        optimizer: the optimizer.
        group: the master's parameter group, with the learning rate of the step.
        master: the master.
    """
    state = optimizer.state.get(master, {})
    grown_at = state.get(GROWN_AT)
    if grown_at is None or master.grad is None:  # without a gradient the master was not stepped
        return
    step = state[
        "step"
    ]  # a tensor of one number, often on the CPU; copying it to a GPU would wait for the GPU
    correction = group["lr"] * (
        _update(state, group, step) - _update(state, group, step - grown_at)
    )
    is_grown = grown_at > 0
    found_inf = getattr(optimizer, "found_inf", None)  # a fused step that a gradient scaler skips
    if found_inf is not None:
        is_grown = is_grown & (found_inf.to(master.device) == 0)
    with torch.no_grad():
        master.add_(torch.where(is_grown, correction, 0))


def _update(state: dict[str, Any], group: dict[str, Any], n_steps: Tensor) -> Tensor:
    """Return the update of each component at learning rate 1, with moments that are means of ``n_steps`` gradients."""
    first, second = (_bias(beta, n_steps) for beta in group["betas"])
    squares = state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"]
    update: Tensor = state["exp_avg"] / first / ((squares / second).sqrt() + group["eps"])
    return update


def _bias(beta: float | Tensor, n_steps: Tensor) -> Tensor:
    """Return 1 - beta^n, exactly also for a small n and a beta near 1."""
    return -torch.expm1(n_steps * (math.log(beta) if beta else -math.inf))

"""Gradient scalers that have unscaled gradients before the components were chosen, so that theirs would stay scaled."""

from __future__ import annotations

import gc
from collections.abc import Collection
from typing import Any

from torch import nn
from torch.amp.grad_scaler import GradScaler, OptState
from torch.optim import Optimizer


def refuse_unscaled(masters: Collection[nn.Parameter]) -> None:
    """Refuse to give masters their first gradients between a scaler's ``unscale_`` and the step.

    An optimizer that unscales inside its step, as a fused one, is fine. Nothing registers scalers, so they are looked for
    among all objects but those of ``gc.freeze``, which takes 0.1 to 0.6 s.

    Raises:
        RuntimeError: a scaler has unscaled the gradients of an optimizer that holds one of the masters.
    """
    found = [one for one in gc.get_objects() if issubclass(type(one), GradScaler | Optimizer)]
    scalers: list[Any] = [one for one in found if isinstance(one, GradScaler)]
    optimizers = {id(one): one for one in found if isinstance(one, Optimizer)}
    own = set(map(id, masters))
    for scaler in scalers:
        for key, state in vars(scaler).get("_per_optimizer_states", {}).items():  # none if disabled
            groups = optimizers[key].param_groups if key in optimizers else []
            holds_own = any(id(master) in own for group in groups for master in group["params"])
            if holds_own and state["stage"] is OptState.UNSCALED:
                raise RuntimeError(
                    "the gradient scaler has read the gradients before the components were chosen, so these would stay scaled;"
                    " call sift.finish_selection() before each scaler.unscale_() and scaler.step()"
                )

"""Refuses models that something else trains by several processes, or has replaced the parameters of."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sift_train.ranks.shard import fsdp_modules, is_sharded

DDP_SENTENCE = (
    "the model is wrapped in DistributedDataParallel, which averages dense gradients that the masters do"
    " not get; train the model without this wrapper, its SIFT averages the selected gradients itself"
    " (with transformers.Trainer, use SiftTrainerMixin)"
)


def refuse_inside_ddp(model: nn.Module) -> None:
    """Raise if a DistributedDataParallel calls this model now.

    Raises:
        ValueError: it does.
    """
    active = getattr(DistributedDataParallel, "_active_ddp_module", None)
    if active is not None and any(module is model for module in active.modules()):
        raise ValueError(DDP_SENTENCE)


def refuse_sharded_later(model: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
    """Raise if ``fully_shard`` has replaced parameters of the model.

    Args:
        model: the model.
        parameters: those that are trained, as they were when the SIFT was built.

    Raises:
        ValueError: it has.
    """
    if fsdp_modules(model) and not any(is_sharded(parameter) for parameter in parameters):
        raise ValueError(
            "fully_shard was called after the SIFT was built and has replaced the parameters that it"
            " trains; call fully_shard first, then build the SIFT from the sharded model"
        )


def refuse_returned_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Raise if parameters have dense gradients at a step, which the hooks had taken.

    Raises:
        ValueError: one has.
    """
    if any(parameter.grad is not None for parameter in parameters):
        raise ValueError(DDP_SENTENCE)

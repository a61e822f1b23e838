"""Optimizer and learning-rate schedule of a run, built from its settings."""

from __future__ import annotations

import math

from torch.optim import SGD, Adafactor, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from sift_train.config import FitConfig
from sift_train.groups import grouped_parameters
from sift_train.sift import SIFT


def build_optimizer(sift: SIFT, config: FitConfig) -> Optimizer:
    """Return the optimizer over all masters of ``sift``, not attached yet."""
    groups = grouped_parameters(sift, config.weight_decay, decay_to=config.decay_to)
    if not isinstance(config.optimizer, str):
        return config.optimizer([{"lr": config.lr, **group} for group in groups])
    if config.optimizer == "sgd":
        return SGD(groups, lr=config.lr, momentum=config.momentum)
    if config.optimizer == "adafactor":
        return Adafactor(groups, lr=config.lr)
    return AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, **_lean(sift, config))


def _lean(sift: SIFT, config: FitConfig) -> dict[str, bool]:
    """Return what keeps AdamW from copying all masters' state at once, as torch's default on CUDA does.

    A gradient scaler leaves it to a fused step whether to change anything, and the step counts as
    taken; without one, each tensor is stepped by itself.
    """
    if not all(master.is_cuda for master in sift.parameters_in_optimizer()):
        return {}
    return {"foreach": False} if config.mixed_precision == "fp16" else {"fused": True}


def build_schedule(optimizer: Optimizer, config: FitConfig, n_steps: int) -> LambdaLR:
    """Return the schedule: a linear rise, then constant or falling to zero after the last step."""
    n_warmup = math.ceil(config.warmup * n_steps)

    def factor(step: int) -> float:
        if step < n_warmup:
            return (step + 1) / (n_warmup + 1)
        done = (step - n_warmup) / max(n_steps - n_warmup, 1)
        if config.schedule == "linear":
            return max(1.0 - done, 0.0)
        if config.schedule == "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * min(done, 1.0)))
        return 1.0

    return LambdaLR(optimizer, factor)

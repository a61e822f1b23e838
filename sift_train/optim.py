"""Builds the optimizer and the learning-rate schedule of a run from its settings."""

from __future__ import annotations

import math

from torch.optim import SGD, Adafactor, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from sift_train.config import FitConfig
from sift_train.groups import grouped_parameters
from sift_train.sift import SIFT


def build_optimizer(sift: SIFT, config: FitConfig) -> Optimizer:
    """Return the optimizer of all masters of ``sift``; the caller must attach it."""
    groups = grouped_parameters(sift, config.weight_decay, decay_to=config.decay_to)
    if not isinstance(config.optimizer, str):
        return config.optimizer([{"lr": config.lr, **group} for group in groups])
    if config.optimizer == "sgd":
        return SGD(groups, lr=config.lr, momentum=config.momentum)
    if config.optimizer == "adafactor":
        return Adafactor(groups, lr=config.lr)
    return AdamW(
        groups, lr=config.lr, betas=config.betas, eps=config.eps, **_adamw_kernel(sift, config)
    )


def _adamw_kernel(sift: SIFT, config: FitConfig) -> dict[str, bool]:
    """Return an AdamW option that avoids temporary copies of all masters, as torch makes for models on CUDA.

    With fp16 the option is a loop over the tensors, since a gradient scaler cannot report whether a
    fused step was skipped. Otherwise it is the fused kernel, which torch also has for masters on the CPU.
    """
    if not all(parameter.is_cuda for parameter in sift.trainable_parameters()):
        return {}
    return {"foreach": False} if config.mixed_precision == "fp16" else {"fused": True}


def build_schedule(optimizer: Optimizer, config: FitConfig, n_steps: int) -> LambdaLR:
    """Return the schedule: a linear warm-up, then a constant rate or a decrease to zero."""
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

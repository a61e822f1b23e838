"""One run of quality.py: train a model by a method at a learning rate, and test it."""

from __future__ import annotations

import ctypes
import statistics
import sys
import time
from typing import Any

import torch
from quality_methods import Method, Task, gradient_sums, prepare, share_held
from torch import Tensor, nn
from training import memory_in_use, peak_memory

HEAD_LR = 1e-3
WARMUP = 0.06
MAX_NORM = 1.0
N_OTHER = 4  # batches, not used for choosing, on which the held share of Σ|gradient| is measured
TAIL = 0.2  # share of the steps, at the end, whose mean is the training loss


class Runner:
    """Runs a task by any method; keeps choices and gradient sums, which do not depend on the rate.

    Args:
        task: the model, its data and its test.
    """

    def __init__(self, task: Task) -> None:
        self._task = task
        self._chosen: dict[Any, dict[str, Tensor]] = {}
        self._sums: dict[Any, dict[str, Tensor]] = {}

    def run(self, method: Method, lr: float, seed: int) -> dict[str, Any]:
        """Return scores, compute used and, for SIFT, the share of Σ|gradient| that it holds."""
        task = self._task
        model = task.model(seed)
        weight_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
        start = time.process_time()
        shares: dict[str, float] = {}
        trained = prepare(method, task, model, seed, self._chosen)
        choose_seconds = time.process_time() - start
        if trained.sift is not None:
            shares = self._shares(method, seed)
        release_memory()
        before = memory_in_use(torch.device("cpu"))
        start = time.process_time()
        torch.manual_seed(seed)
        losses = train(task, model, trained.body, trained.head, lr, seed)
        seconds = time.process_time() - start
        peak = peak_memory(torch.device("cpu")) - before + weight_bytes
        result = {
            "dev": task.evaluate(model, "dev"),
            "test": task.evaluate(model, "test"),
            "train_loss": statistics.mean(losses[-max(1, round(TAIL * len(losses))) :]),
            "n_trained": trained.n_trained,
            "choose_seconds": round(choose_seconds, 3),
            "train_seconds": round(seconds, 2),
            "peak_bytes": peak,
            **shares,
        }
        if trained.sift is not None:
            trained.sift.close()
        return result

    def _shares(self, method: Method, seed: int) -> dict[str, float]:
        chosen = self._chosen[method, seed]
        found = {"share": share_held(chosen, self._sum(seed, N_OTHER, max(8, method.n_batches)))}
        if method.n_batches:
            found["own_share"] = share_held(chosen, self._sum(seed, method.n_batches, 0))
        return found

    def _sum(self, seed: int, n_batches: int, first: int) -> dict[str, Tensor]:
        key = seed, n_batches, first
        if key not in self._sums:
            self._sums = {k: v for k, v in self._sums.items() if k[0] == seed}  # bounds the memory
            self._sums[key] = gradient_sums(self._task, seed, n_batches, first=first)
        return self._sums[key]


def train(
    task: Task,
    model: nn.Module,
    body: list[nn.Parameter],
    head: list[nn.Parameter],
    lr: float,
    seed: int,
) -> list[float]:
    """Train a model; return the loss of each step.

    AdamW without weight decay, a linear schedule with warm-up, and gradients clipped to a norm of 1.
    """
    groups = [{"params": body, "lr": lr}, {"params": head, "lr": HEAD_LR}]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], weight_decay=0.0, fused=True)
    n_steps = task.n_steps
    n_warm = max(1, round(WARMUP * n_steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / n_warm, 1 - step / n_steps)
    )
    losses = []
    model.train()
    for batch in task.batches(seed):
        optimizer.zero_grad()
        loss = task.loss(model, batch)
        loss.backward()
        nn.utils.clip_grad_norm_([*body, *head], MAX_NORM)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    return losses


def release_memory() -> None:
    """Return freed memory to the system, so that a peak is that of one run."""
    if sys.platform == "linux":
        ctypes.CDLL("libc.so.6").malloc_trim(0)

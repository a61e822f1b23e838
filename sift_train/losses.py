"""The losses of a run, which the host reads from the device some steps later."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sift_train.config import StepReport
from sift_train.listeners import Listener
from sift_train.sift import SIFT


@dataclass(frozen=True)
class Step:
    """What a step returns as tensors of one element on the device.

    Attributes:
        loss: the mean over all ranks.
        lr: the learning rate of full fine-tuning.
        norm: the norm of the gradients before clipping; None if they are not clipped.
        interrupted: not 0 if a rank was interrupted.
    """

    loss: Tensor
    lr: float
    norm: Tensor | None
    interrupted: Tensor


class Losses:
    """Reads the losses of a run from the device, and reports its steps.

    Attributes:
        values: one per step whose loss has been read; a resumed run begins with those of its checkpoint.
        is_interrupted: whether a rank was interrupted in one of these steps.

    Args:
        sift: what trains the model. From a bad loss on, its ``may_write`` prevents all changes.
        n_steps: steps of the run.
        every: steps between two readings; with 1, a bad loss is found before its step.
        listeners: get a report of each step.
    """

    def __init__(self, sift: SIFT, n_steps: int, every: int, listeners: Sequence[Listener]) -> None:
        self._sift = sift
        self._n_steps = n_steps
        self._every = every
        self._listeners = listeners
        self._unread: list[Step] = []
        self.values: list[float] = []
        self.is_interrupted = False

    @property
    def n_done(self) -> int:
        """Number of steps so far, also those whose loss has not been read."""
        return len(self.values) + len(self._unread)

    def check(self, loss: Tensor) -> None:
        """Check the loss of the next step, or let nothing be written if it is bad and the host reads it later.

        Raises:
            ValueError: it is infinite or NaN.
        """
        if self._every == 1:
            _check_finite(float(loss), self.n_done + 1)
            return
        before = self._sift.may_write
        self._sift.may_write = loss.isfinite() if before is None else before & loss.isfinite()

    def add(self, step: Step) -> None:
        """Add a step; read all losses if it is time to.

        Raises:
            ValueError: as ``read``.
        """
        self._unread.append(step)
        if self.n_done % self._every == 0:
            self.read()

    def read(self) -> None:
        """Read the losses of all steps so far, and report these.

        Raises:
            ValueError: a loss is infinite or NaN.
        """
        steps, self._unread = self._unread, []
        if not steps:
            return
        norms = [step.norm.to(step.loss.device) for step in steps if step.norm is not None]
        flags = [step.interrupted for step in steps]
        values = torch.stack([*(step.loss for step in steps), *flags, *norms]).tolist()
        self.is_interrupted |= any(values[len(steps) : 2 * len(steps)])
        rest = values[2 * len(steps) :] or [None] * len(steps)
        for step, loss, norm in zip(steps, values, rest, strict=False):
            n_done = len(self.values) + 1
            _check_finite(loss, n_done)
            self.values.append(loss)
            sparse_lr = self._sift.sparse_lr(step.lr)
            report = StepReport(n_done, self._n_steps, loss, step.lr, norm, sparse_lr)
            for listener in self._listeners:
                listener.on_step(report)


def _check_finite(loss: float, step: int) -> None:
    if math.isfinite(loss):
        return
    if step == 1:
        raise ValueError(
            f"the loss is {loss} at step 1, before anything was trained; check the first "
            "batches, the loss function and the weights of the base"
        )
    raise ValueError(f"the loss is {loss} at step {step}; lower the learning rate")

"""``fit``: trains a sparse set of components with accelerate and writes the delta.

Every micro-batch is trained on in the order in which the data gives it, those that choose the
components included; after the last step the weights on disk are the weights in memory.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from itertools import chain, count, islice
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator  # type: ignore[import-untyped]
from accelerate.state import AcceleratorState  # type: ignore[import-untyped]
from accelerate.utils import send_to_device, set_seed  # type: ignore[import-untyped]
from torch import Tensor, nn

from sift_train.config import FitConfig, FitResult, StepReport
from sift_train.export import check_places, export_delta
from sift_train.loading import load_model
from sift_train.optim import build_optimizer, build_schedule
from sift_train.sift import SIFT

Loss = Callable[[nn.Module, Any], Tensor]


def fit(
    model: str | PathLike[str] | nn.Module,
    data: Iterable[Any],
    *,
    output: str | PathLike[str],
    config: FitConfig | None = None,
    loss: Loss | None = None,
    base: str | PathLike[str] | None = None,
    base_id: str | None = None,
    save_target: str | PathLike[str] | None = None,
    overwrite: bool = False,
    on_step: Callable[[StepReport], None] | None = None,
) -> FitResult:
    """Train a sparse set of the model's components, write what changed, and say how it went.

    A model given as a module is trained in place and keeps the trained weights. Random number
    generators are seeded.

    Args:
        model: a folder of a transformers model, or a module. A module is moved to the device that
            accelerate chooses.
        data: micro-batches, such as a DataLoader; it is iterated over once per pass.
        output: where the delta goes.
        config: settings; the defaults if left out.
        loss: maps model and micro-batch, on the model's device, to a scalar. By default the batch
            is a mapping of keyword arguments and the model's output has a ``loss``.
        base: the checkpoint that a module was loaded from. By default the folder the model was
            given as; for a module, the module saved with the weights it came with.
        base_id: where others find the base, such as ``org/model@<commit>``; recorded as a hint.
        save_target: keep the trained checkpoint here, which the delta makes of the base.
        overwrite: replace what is at ``output`` and ``save_target``.
        on_step: told about every optimizer step.

    Raises:
        FileExistsError: something is at ``output`` or ``save_target`` and may not be replaced.
        FileNotFoundError: base, or a folder to write in, does not exist.
        TypeError: no loss can be found in the model's output, or the data has no length where one
            is needed.
        ValueError: an argument is out of range, a parameter cannot be trained in place, there is
            no data, or the loss stops being finite.
    """
    config = config or FitConfig()
    if not isinstance(model, nn.Module):
        base = model if base is None else base
        model = load_model(model)
    check_places(model, output, base=base, save_target=save_target, overwrite=overwrite)
    n_steps = _count_steps(data, config)
    start = time.perf_counter()
    with _accelerator(config) as accelerator:
        set_seed(config.seed)
        model.to(accelerator.device)
        with SIFT(
            model,
            config.sparse_rate,
            config.sparse_module,
            config.exception,
            gradient_checkpointing=config.gradient_checkpointing,
            selection=config.selection,
            seed=config.seed,
        ) as sift:
            run = _Run(accelerator, sift, config, loss or _own_loss, n_steps)
            losses = run.train(data, on_step)
            trained = time.perf_counter()
            nnz = export_delta(
                model,
                output,
                sift=sift,
                base=base,
                base_id=base_id,
                info=_info(config, sift, n_steps),
                save_target=save_target,
                overwrite=overwrite,
            )
    return FitResult(
        delta=Path(output),
        delta_bytes=Path(output).stat().st_size,
        target=None if save_target is None else Path(save_target),
        n_trained=sift.n_trained,
        n_total=sift.n_total,
        nnz=nnz,
        losses=losses,
        train_seconds=trained - start,
        export_seconds=time.perf_counter() - trained,
    )


class _Run:
    """The loop of one run."""

    def __init__(
        self, accelerator: Accelerator, sift: SIFT, config: FitConfig, loss: Loss, n_steps: int
    ) -> None:
        self._accelerator = accelerator
        self._sift = sift
        self._config = config
        self._loss = loss
        self._n_steps = n_steps

    def train(
        self, data: Iterable[Any], on_step: Callable[[StepReport], None] | None
    ) -> tuple[float, ...]:
        """Choose the components, do all steps, return the loss of each."""
        model = self._sift.model
        was_training = model.training
        model.train()
        try:
            return self._steps(data, on_step)
        finally:
            model.train(was_training)

    def _steps(
        self, data: Iterable[Any], on_step: Callable[[StepReport], None] | None
    ) -> tuple[float, ...]:
        stream = iter(data)
        first = list(islice(stream, self._config.selection_batches))
        self._select(first)
        optimizer = build_optimizer(self._sift, self._config)
        self._sift.attach(optimizer)
        prepared = self._accelerator.prepare_optimizer(optimizer)
        schedule = build_schedule(optimizer, self._config, self._n_steps)
        losses: list[float] = []
        for window in islice(self._windows(chain(first, stream), data), self._n_steps):
            lr = float(schedule.get_last_lr()[0])
            prepared.zero_grad()
            loss = self._backward(window)
            norm = self._clip()
            prepared.step()
            if not prepared.step_was_skipped:
                schedule.step()
            losses.append(self._finite(loss, len(losses) + 1))
            if on_step is not None:
                on_step(StepReport(len(losses), self._n_steps, losses[-1], lr, norm))
        return tuple(losses)

    def _select(self, batches: list[Any]) -> None:
        """Choose by these micro-batches, leaving random state and model as they were."""
        if all(part.is_selected for part in self._sift.sparse_mapping.values()):
            return
        device = self._accelerator.device
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), self._sift.selecting():
            for batch in batches:
                loss: Any = self._forward(batch)
                loss.backward()

    def _windows(self, first_pass: Iterator[Any], data: Iterable[Any]) -> Iterator[list[Any]]:
        size = self._config.accumulation
        for batches in chain([first_pass], (iter(data) for _ in count())):
            n_windows = 0
            while window := list(islice(batches, size)):
                n_windows += 1
                yield window
            if n_windows == 0:
                raise ValueError(
                    "the data gave no batch, or none on a further pass; give a list or a loader"
                )

    def _forward(self, batch: Any) -> Tensor:
        with self._accelerator.autocast():
            loss = self._loss(self._sift.model, send_to_device(batch, self._accelerator.device))
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise TypeError("the loss is not a tensor of one element; return the mean, a scalar")
        return loss.reshape(())

    def _backward(self, window: list[Any]) -> Tensor:
        total = torch.zeros((), device=self._accelerator.device)
        for batch in window:
            loss = self._forward(batch)
            self._accelerator.backward(loss / len(window))
            total += loss.detach().float() / len(window)
        return total

    def _clip(self) -> float | None:
        if self._config.max_grad_norm is None:
            return None
        masters = self._sift.parameters_in_optimizer()
        norm = self._accelerator.clip_grad_norm_(masters, self._config.max_grad_norm)
        return float(norm)

    @staticmethod
    def _finite(loss: Tensor, step: int) -> float:
        value = float(loss)
        if not math.isfinite(value):
            raise ValueError(f"the loss is {value} at step {step}; lower the learning rate")
        return value


def _own_loss(model: nn.Module, batch: Any) -> Tensor:
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"batch is a {type(batch).__name__}, expected a mapping of the model's arguments; "
            "give fit a loss that knows your batches"
        )
    output = model(**batch)
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if not isinstance(loss, Tensor):
        raise TypeError(
            f"the output of {type(model).__name__} has no loss; "
            "put labels in the batch, or give fit a loss"
        )
    return loss


def _count_steps(data: Iterable[Any], config: FitConfig) -> int:
    if config.max_steps is not None:
        return config.max_steps
    if not isinstance(data, Sized):
        raise TypeError(f"data is a {type(data).__name__} without a length; set max_steps")
    if len(data) == 0:
        raise ValueError("the data gave no batch; give at least one")
    return config.epochs * math.ceil(len(data) / config.accumulation)


def _info(config: FitConfig, sift: SIFT, n_steps: int) -> dict[str, Any]:
    return {
        "method": "sift",
        "settings": config.as_json(),
        "steps": n_steps,
        "n_trained": sift.n_trained,
        "n_total": sift.n_total,
    }


@contextmanager
def _accelerator(config: FitConfig) -> Iterator[Accelerator]:
    """Lend an accelerator; what it sets up for the process goes with it, unless it was there."""
    was_set_up = bool(AcceleratorState._shared_state)
    accelerator = Accelerator(mixed_precision=config.mixed_precision)
    try:
        if accelerator.num_processes > 1:
            raise ValueError(
                f"fit runs in {accelerator.num_processes} processes, but trains on one device; "
                "start it as a single process"
            )
        yield accelerator
    finally:
        if not was_set_up:
            AcceleratorState._reset_state()

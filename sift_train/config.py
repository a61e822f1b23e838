"""What a run is told and what it tells: settings checked when made, reports and results frozen."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sift_train.rules import Rule, find_rule
from sift_train.selection import n_selected
from sift_train.targets import ALL_LINEAR

OPTIMIZERS = ("adamw", "sgd")
SCHEDULES = ("constant", "linear", "cosine")
PRECISIONS = ("no", "bf16", "fp16")


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """Settings of ``fit``.

    Attributes:
        sparse_rate: share of each tensor's components to train, 0 to 1.
        sparse_module: name fragments of the parameters to train sparsely, or ``"all-linear"``.
        exception: name fragments of the parameters to train densely.
        selection: name of a rule that ranks components, or a rule.
        selection_batches: micro-batches whose gradients choose the components. They are trained on
            as well.
        optimizer: ``"adamw"`` or ``"sgd"``.
        lr: peak learning rate.
        weight_decay: toward zero, on trained components of matrices; 1-D parameters have none.
        betas, eps: of AdamW.
        momentum: of SGD.
        schedule: after the warm-up: ``"constant"``, or to zero by ``"linear"`` or ``"cosine"``.
        warmup: share of all steps in which the learning rate rises linearly, 0 to 1.
        epochs: passes over the data, unless ``max_steps`` is given.
        max_steps: optimizer steps; the data is repeated as often as needed.
        accumulation: micro-batches per optimizer step; the last step of a pass may have fewer.
        max_grad_norm: clip the gradient of what is trained to this norm; None does not clip.
        mixed_precision: ``"no"``, ``"bf16"`` or ``"fp16"`` (GPU only).
        gradient_checkpointing: recompute activations in the backward pass.
        seed: of everything random: data order, dropout, ties.

    Raises:
        ValueError: a setting is out of range.
    """

    sparse_rate: float = 0.01
    sparse_module: str | Sequence[str] = ALL_LINEAR
    exception: str | Sequence[str] = ()
    selection: str | Rule = "gradient"
    selection_batches: int = 4
    optimizer: str = "adamw"
    lr: float = 2e-4
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    momentum: float = 0.0
    schedule: str = "linear"
    warmup: float = 0.06
    epochs: int = 1
    max_steps: int | None = None
    accumulation: int = 1
    max_grad_norm: float | None = 1.0
    mixed_precision: str = "no"
    gradient_checkpointing: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        n_selected(1, self.sparse_rate)
        find_rule(self.selection)
        _check_choice("optimizer", self.optimizer, OPTIMIZERS)
        _check_choice("schedule", self.schedule, SCHEDULES)
        _check_choice("mixed_precision", self.mixed_precision, PRECISIONS)
        for name in ("selection_batches", "epochs", "accumulation"):
            _check_at_least_one(name, getattr(self, name))
        if self.max_steps is not None:
            _check_at_least_one("max_steps", self.max_steps)
        for name in ("lr", "eps"):
            _check_range(name, getattr(self, name), above=0.0)
        if self.max_grad_norm is not None:
            _check_range("max_grad_norm", self.max_grad_norm, above=0.0)
        for name, value in (("weight_decay", self.weight_decay), ("momentum", self.momentum)):
            _check_range(name, value)
        for name, value in (("warmup", self.warmup), *(("betas", beta) for beta in self.betas)):
            _check_range(name, value, up_to=1.0)

    def as_json(self) -> dict[str, bool | int | float | str | list[float] | list[str] | None]:
        """Return the settings as plain JSON; a rule of one's own is named ``"custom"``."""
        plain: dict[str, bool | int | float | str | list[float] | list[str] | None] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Rule):
                value = "custom"
            elif isinstance(value, Sequence) and not isinstance(value, str):
                value = list(value)
            plain[field.name] = value
        return plain


@dataclass(frozen=True)
class StepReport:
    """One optimizer step, as told to ``on_step``.

    Attributes:
        step: counted from 1.
        n_steps: of the whole run.
        loss: mean over the step's micro-batches.
        lr: learning rate used.
        grad_norm: of what is trained, before clipping; None without clipping.
    """

    step: int
    n_steps: int
    loss: float
    lr: float
    grad_norm: float | None


@dataclass(frozen=True)
class FitResult:
    """What a run made.

    Attributes:
        delta: the delta written.
        delta_bytes: its size.
        target: the trained checkpoint, None unless ``save_target`` asked to keep it.
        n_trained: components trained.
        n_total: components of the model, tied ones counted once.
        nnz: components that the delta changes.
        losses: one per optimizer step.
        train_seconds: selection and training.
        export_seconds: saving, comparing and writing.
    """

    delta: Path
    delta_bytes: int
    target: Path | None
    n_trained: int
    n_total: int
    nnz: int
    losses: tuple[float, ...]
    train_seconds: float
    export_seconds: float

    @property
    def n_steps(self) -> int:
        """Optimizer steps done."""
        return len(self.losses)

    @property
    def trained_share(self) -> float:
        """Trained components over all of the model's."""
        return self.n_trained / self.n_total


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; choose one of {', '.join(choices)}")


def _check_at_least_one(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} is {value!r}; it is a count and at least 1")


def _check_range(
    name: str, value: float, *, above: float | None = None, up_to: float | None = None
) -> None:
    fits = value > above if above is not None else value >= 0.0
    if not fits or value == float("inf") or (up_to is not None and value > up_to):
        low = f"above {above:g}" if above is not None else "0 or more"
        high = f" and at most {up_to:g}" if up_to is not None else " and finite"
        raise ValueError(f"{name} is {value}; it must be {low}{high}")

"""The settings of a run, checked on creation, and its reports and results; all are frozen."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Self, SupportsFloat

from torch.optim import Optimizer

from sift_train.chooser import BUDGETS
from sift_train.groups import DECAYS
from sift_train.host import refuse_scaler
from sift_train.known import check_integer, settings_checked
from sift_train.lean import check_masters
from sift_train.plain import PlainJSON, plain
from sift_train.reselection import Reselection, find_reselection
from sift_train.rules import Selection, find_rule
from sift_train.selection import n_selected
from sift_train.structure import Block, check_block
from sift_train.targets import ALL_LINEAR, Names
from sift_train.yaml_files import (
    check_types,
    lists_to_tuples,
    read_settings,
    write_yaml,
)

OPTIMIZERS = ("adamw", "sgd", "adafactor")
SCHEDULES = ("constant", "linear", "cosine")
PRECISIONS = ("no", "bf16", "fp16")
REDUCE_DTYPES = ("fp32", "bf16")
_MAX_SEED = 2**32 - 1  # of numpy


@settings_checked
@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """Settings of ``fit``.

    Attributes:
        sparse_rate: share of each tensor's components to train, above 0 to 1.
        sparse_module: name fragments or regular expressions of the parameters to train sparsely,
            or ``"all-linear"``.
        exception: name fragments or regular expressions of the parameters to train densely.
        selection: the rule that ranks components: a rule's name, a ``Rule``, or a function of
            weight and gradient. A mapping of parameter names to masks or indices, a delta, or the path of
            a mask or a delta chooses explicitly.
        selection_batches: number of micro-batches, over all ranks, whose gradients choose the components. They are
            also used for training. Above 1, the scores are summed on the CPU, 4 bytes for each component of
            the target tensors.
        budget: ``"tensor"``: the rate holds for each tensor; ``"row"``: for each row; ``"global"``: for all
            tensors together.
        block: choose whole ``"row"``s, ``"column"``s or blocks of (height, width), as ``SIFT`` does.
        reselection: when and how the choice moves during the training: a ``Reselection``, a mapping of its settings, or
            a preset's name, ``"lift"`` or ``"spiel"``; None: never. ``selection_batches`` micro-batches, fewer at the
            end of a pass, rank by gradients, and as many further ones measure the share of ``lr_transfer`` anew.
        optimizer: ``"adamw"``, ``"sgd"``, ``"adafactor"``, or a function that takes parameter
            groups and returns an optimizer.
        lr: peak learning rate.
        lr_transfer: ``lr`` is a learning rate of full fine-tuning. For parameters trained sparsely it is divided by
            the share of the sum of |gradient| that the chosen components hold, as ``SIFT`` does.
        masters: ``"fp32"``, or masters that need less memory, ``"stochastic"`` or ``"kahan"``, as for ``SIFT``.
        masters_device: ``"model"``, or ``"cpu"``: masters and optimizer states are in the memory of the host, as for ``SIFT``.
        weight_decay: applied to trained components of matrices, not to 1-D parameters.
        decay_to: weight decay moves weights toward ``"zero"``, or toward the ``"base"`` weights.
        betas, eps: settings of AdamW.
        momentum: setting of SGD.
        schedule: the learning rate after the warm-up: ``"constant"``, or a ``"linear"`` or
            ``"cosine"`` decrease to zero.
        warmup: share of all steps in which the learning rate rises linearly, 0 to 1.
        epochs: passes over the data; ignored if ``max_steps`` is given.
        max_steps: number of optimizer steps. The data is repeated as often as needed; if it cannot
            be repeated, as with a generator, the run ends when the data ends.
        accumulation: micro-batches per optimizer step and rank; the last step of a pass may have fewer.
        max_grad_norm: the gradient of the trained components is clipped to this norm; None: no
            clipping.
        mixed_precision: ``"no"``, ``"bf16"`` or ``"fp16"`` (GPU only).
        gradient_checkpointing: recompute activations in the backward pass.
        log_every: on a GPU, losses and gradient norms are read once in this many steps, because
            each read waits for the device. On a CPU they are read and reported at every step.
        eval_every: steps between evaluations, which need ``evaluate`` of ``fit``, as do ``eval_before`` and
            ``patience``; None: no evaluation except the one after the last
            step.
        eval_before: also evaluate before the first step, so that the delta records the scores of the base.
        patience: stop after this many evaluations without a better first value; None: never. With it, the model and the
            delta get the weights of the best evaluation at the end, also if all steps are done; a copy of the trained
            components is kept on the CPU. Not if the run was interrupted, and not for a sharded model: they
            have the weights of the last step.
        higher_is_better: whether a higher first value of an evaluation is better.
        save_every: steps between checkpoints; needs ``run_dir`` of ``fit``.
        publish: path of a folder or URL of a store: a channel to which the weights are published during the
            training, see ``sparsedelta.Channel``; None: no channel. Only with one process.
        publish_every: steps between two versions; the last step is always published, and then the weights of the best
            evaluation, if ``patience`` goes back to them. It needs ``publish``.
        trackers: names of trackers of accelerate, such as ``"tensorboard"``.
        reduce_dtype: with several ranks, the dtype in which the gradients of the trained components
            are sent and summed, ``"fp32"`` or ``"bf16"``. The masters of an fp64 model are sent as fp64.
        seed: seeds all randomness: data order, dropout, choice among equal scores.

    Raises:
        ValueError: a setting is out of range, or has no effect without another one.
    """

    sparse_rate: float = 0.01
    sparse_module: Names = ALL_LINEAR
    exception: Names = ()
    selection: Selection = "random"
    selection_batches: int = 4
    budget: str = "tensor"
    block: Block | None = None
    reselection: Reselection | Mapping[str, Any] | str | None = None
    optimizer: str | Callable[[list[dict[str, Any]]], Optimizer] = "adamw"
    lr: float = 2e-4
    lr_transfer: bool = True
    masters: str = "fp32"
    masters_device: str = "model"
    weight_decay: float = 0.0
    decay_to: str = "zero"
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
    log_every: int = 10
    eval_every: int | None = None
    eval_before: bool = False
    patience: int | None = None
    higher_is_better: bool = True
    save_every: int | None = None
    publish: str | PathLike[str] | None = None
    publish_every: int = 1
    trackers: Sequence[str] = ()
    reduce_dtype: str = "fp32"
    seed: int = 0

    def __post_init__(self) -> None:
        lists_to_tuples(self)
        check_types(self)
        n_selected(1, self.sparse_rate)
        find_rule(self.selection)
        check_masters(self.masters, self.masters_device)
        object.__setattr__(self, "reselection", find_reselection(self.reselection))
        if isinstance(self.optimizer, str):
            _check_choice("optimizer", self.optimizer, OPTIMIZERS)
        _check_choice("budget", self.budget, BUDGETS)
        check_block(self.block)
        _check_choice("decay_to", self.decay_to, DECAYS)
        _check_choice("schedule", self.schedule, SCHEDULES)
        _check_choice("mixed_precision", self.mixed_precision, PRECISIONS)
        _check_choice("reduce_dtype", self.reduce_dtype, REDUCE_DTYPES)
        if self.mixed_precision == "fp16":
            refuse_scaler(self.masters_device)
        for name in ("selection_batches", "epochs", "accumulation", "log_every", "publish_every"):
            check_integer(name, getattr(self, name), least=1)
        if self.publish is None and self.publish_every != 1:
            raise ValueError(
                f"publish_every is {self.publish_every!r}, but publish names no channel; give both, or neither"
            )
        for name in ("max_steps", "eval_every", "patience", "save_every"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), least=1)
        check_integer("seed", self.seed, least=0)
        if self.seed > _MAX_SEED:
            raise ValueError(f"seed is {self.seed}; it must be at most {_MAX_SEED}")
        for name in ("lr", "eps"):
            _check_range(name, getattr(self, name), above=0.0)
        if self.max_grad_norm is not None:
            _check_range("max_grad_norm", self.max_grad_norm, above=0.0)
        for name, value in (("weight_decay", self.weight_decay), ("momentum", self.momentum)):
            _check_range(name, value)
        betas: Any = self.betas
        if not isinstance(betas, Sequence) or isinstance(betas, str) or len(betas) != 2:
            raise ValueError(f"betas is {betas!r}; it must be two numbers")
        for name, value in (("warmup", self.warmup), *(("betas", beta) for beta in betas)):
            _check_range(name, value, up_to=1.0)

    @classmethod
    def from_yaml(cls, path: str | PathLike[str]) -> Self:
        """Return the settings in a YAML file.

        Raises:
            ValueError: the file is not YAML, a setting is not known, or a value is out of range.
        """
        return read_settings(cls, path)

    def to_yaml(self, path: str | PathLike[str]) -> None:
        """Write all settings as a YAML file.

        Raises:
            ValueError: ``selection`` or ``optimizer`` is none that a file can hold.
        """
        write_yaml(self, path)

    def as_json(self) -> dict[str, PlainJSON]:
        """Return the settings as plain JSON, without those of the channel; a ``Rule`` or a function becomes ``"custom"``."""
        names = [field.name for field in dataclasses.fields(self)]
        return {
            name: plain(getattr(self, name)) for name in names if not name.startswith("publish")
        }


@dataclass(frozen=True)
class StepReport:
    """The report of one optimizer step, given to ``on_step``.

    Attributes:
        step: number of the step, counted from 1.
        n_steps: number of steps of the whole run.
        loss: mean over the step's micro-batches.
        lr: learning rate of the step, as stated.
        grad_norm: gradient norm of the trained components before clipping; None without clipping.
        sparse_lr: learning rate of the parameters trained sparsely; that of ``lr_transfer``, otherwise ``lr``.
    """

    step: int
    n_steps: int
    loss: float
    lr: float
    grad_norm: float | None
    sparse_lr: float


@dataclass(frozen=True)
class Evaluation:
    """The result of one evaluation.

    Attributes:
        step: number of the step after which the model was evaluated.
        values: the values by name; a single number has the name ``"value"``.
    """

    step: int
    values: Mapping[str, float]

    @property
    def first(self) -> float:
        """The first value; early stopping (``patience``) compares it."""
        return next(iter(self.values.values()))


@dataclass(frozen=True)
class FitResult:
    """The result of a run.

    Attributes:
        delta: path of the delta.
        delta_bytes: size of the delta.
        target: path of the trained checkpoint, None if ``save_target`` was not given.
        n_trained: number of trained components.
        n_total: number of components of the model, tied ones counted once.
        nnz: number of components that the delta changes.
        losses: one per optimizer step, including the steps before a resume.
        train_seconds: time that this call spent on selection and training.
        export_seconds: time spent on saving the model, comparing it and writing the delta.
        kept_step: the step after which the model had the weights of the delta: that of the best evaluation with ``patience``,
            otherwise the last.
        evaluations: all evaluations, in order.
        stopped: why the run ended: ``"done"``: all steps are done; ``"patience"``: no better value;
            ``"interrupted"``: Ctrl-C or SIGTERM; ``"data"``: the data ended before ``max_steps``.
        checkpoint: folder of the newest checkpoint in ``run_dir``, from which ``resume`` continues; None if there is none.
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
    kept_step: int
    evaluations: tuple[Evaluation, ...] = ()
    stopped: str = "done"
    checkpoint: Path | None = None

    @property
    def n_steps(self) -> int:
        """Number of optimizer steps done."""
        return len(self.losses)

    @property
    def trained_share(self) -> float:
        """Share of the model's components that are trained."""
        return self.n_trained / self.n_total


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; choose one of {', '.join(choices)}")


def _check_range(
    name: str, value: Any, *, above: float | None = None, up_to: float | None = None
) -> None:
    if isinstance(value, bool) or not isinstance(value, SupportsFloat):
        raise ValueError(
            f"{name} is {value!r}, of type {type(value).__name__}; it must be a number"
        )
    number = float(value)
    fits = number > above if above is not None else number >= 0.0
    if not fits or number == float("inf") or (up_to is not None and number > up_to):
        low = f"above {above:g}" if above is not None else "0 or more"
        high = f" and at most {up_to:g}" if up_to is not None else " and finite"
        raise ValueError(f"{name} is {value}; it must be {low}{high}")

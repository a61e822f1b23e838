"""``SiftTrainerMixin`` and ``SiftCallback``: training through a SIFT with ``transformers.Trainer``.

The masters are not parameters of the model, so Trainer neither clips, zeroes, optimizes, saves nor
resumes them. The mixin does all five. The callback does so for an optimizer that the caller has
built; Trainer then saves the full model.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn, optim
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from sift_train.basecheck import check_base, check_weights
from sift_train.config import FitConfig
from sift_train.export import NO_BASE, write_delta
from sift_train.groups import lr_info
from sift_train.host import refuse_scaler
from sift_train.plain import plain
from sift_train.randomness import kept_random_state, seeded_random_state
from sift_train.reselection import Reselection, find_reselection, needs_gradients
from sift_train.saved import STATE_NAME, check_settings, write_state
from sift_train.sift import SIFT
from sift_train.sift_config import SiftConfig
from sift_train.trainer_groups import (
    check_open,
    log_sparse_lr,
    optimizer_groups,
    refuse_fsdp,
    refuse_matrix_optimizer,
    refuse_other_model,
)

if TYPE_CHECKING:
    from transformers import Trainer

    _Trainer = Trainer
else:
    _Trainer = object

logger = logging.getLogger(__name__)
DELTA = "delta.sd"
_REPLACED = (
    "create_optimizer", "training_step", "_clip_grad_norm", "_get_grad_norm", "_save",
    "_load_from_checkpoint", "_load_best_model",
)  # fmt: skip


class SiftCallback(TrainerCallback):
    """Trains the masters with a Trainer whose optimizer holds them; saves and loads their state.

    Example:
        >>> optimizer = torch.optim.AdamW(sift.parameters_in_optimizer(), lr=1e-4)
        >>> trainer = Trainer(model, optimizers=(optimizer, None))
        >>> sift.set_trainer(trainer)  # adds a SiftCallback

    It clips and zeroes the masters' gradients, and chooses by the micro-batches of the first step. At
    each save it adds ``sift.safetensors`` to the checkpoint, and with it ``resume_from_checkpoint`` and
    ``load_best_model_at_end`` continue bit for bit. Trainer saves the full model at each save;
    ``SiftTrainerMixin`` saves a delta. Trainer calls its reporters, such as TensorBoard, before the callbacks that it is given, so
    these do not get the norm and the learning rate of the masters; ``SIFT.set_trainer`` adds this callback before them. With fp16 and
    several micro-batches per step, the gradient scaler reads gradients before the components are
    chosen: choose them beforehand inside ``sift.selecting()``, or use the mixin.

    Args:
        sift: the SIFT of the Trainer's model.
        reselection: when and how the choice moves, as for ``FitConfig``; its ``grow`` must rank without gradients,
            since a callback sees no micro-batches. With ``lr_transfer`` the next step measures the share anew.

    Attributes:
        precedes_reporters: whether Trainer calls it before its reporters, as ``SIFT.set_trainer`` sees to.

    Raises:
        ValueError: the re-selection ranks by gradients, or a setting of it is out of range.
    """

    def __init__(
        self, sift: SIFT, *, reselection: Reselection | Mapping[str, Any] | str | None = None
    ) -> None:
        check_open(sift)
        self._sift = sift
        self._reselection = find_reselection(reselection)
        if self._reselection is not None and needs_gradients(self._reselection.grow):
            raise ValueError(
                f"grow is {self._reselection.grow!r}, which ranks by gradients, and a callback sees no micro-batches; use"
                " SiftTrainerMixin with a SiftConfig, or grow 'principal', 'magnitude' or 'random'"
            )
        self._norm: Tensor | None = None
        self.precedes_reporters = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Check that the optimizer trains all masters, and load the state of a run that resumes.

        Raises:
            ValueError: the optimizer lacks a master, or holds a parameter of the model; or the run resumes
                from a checkpoint without the state of this SIFT, or of a run with other settings.
        """
        refuse_fsdp(args, self._sift.model)
        if args.report_to and not self.precedes_reporters:
            logger.warning(
                "%s will show no norm of the masters' gradients and no sparse_learning_rate, because Trainer calls it before this"
                " callback; call sift.set_trainer(trainer) in place of callbacks=[SiftCallback(sift)]",
                ", ".join(args.report_to),
            )
        if args.fp16:
            refuse_scaler(self._sift.masters_device)
        self._sift.attach(given["optimizer"])
        if self._reselection is not None:
            self._sift.check_reselecting(given["optimizer"])
            self._reselection.warn_if_never(state.max_steps)
        self._sift.check_parameters()
        refuse_other_model(self._sift, given["model"])
        self._sift.grad_acc = args.gradient_accumulation_steps
        if state.global_step:
            self._resume(args, state)

    def _resume(self, args: Any, state: Any) -> None:
        """Load the state of the step at which a run resumes; Trainer has loaded the model already."""
        name = f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        given = args.resume_from_checkpoint
        folders = [Path(given)] if isinstance(given, str) else []
        for folder in (*folders, Path(args.output_dir) / name):
            if folder.name == name and (folder / STATE_NAME).is_file():
                check_settings(folder / STATE_NAME, self._settings())
                self._sift.load(folder / STATE_NAME)
                return
        parts = self._sift.sparse_mapping.values()
        if not any(part.is_trained for part in parts):
            raise ValueError(
                f"the run resumes at step {state.global_step}, but '{folder}' has no {STATE_NAME}, which holds"
                " the choice of components; call sift.load() with the one of the checkpoint before train()"
            )

    def on_save(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Write the state of the SIFT into the checkpoint that Trainer has written."""
        folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if folder.is_dir() and state.is_world_process_zero:
            write_state(self._sift.state_dict(), folder / STATE_NAME, self._settings())

    def _settings(self) -> dict[str, Any]:
        own = {"trained_by": "SiftCallback", "reselection": plain(self._reselection)}
        return {**self._sift.settings, **own}

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Load the state of the best checkpoint, if Trainer has loaded its model."""
        best = state.best_model_checkpoint
        if args.load_best_model_at_end and best and (Path(best) / STATE_NAME).is_file():
            self._sift.load(Path(best) / STATE_NAME)

    def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Move the choice, if it is due before this step."""
        if self._reselection is not None:
            share = self._reselection.share_after(state.global_step, state.max_steps)
            if share:
                with self._reselection.applied(self._sift, given["optimizer"], share):
                    pass

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Clip the gradient of the trained components to ``max_grad_norm``."""
        self._sift.sync_gradients()
        if args.max_grad_norm:
            self._norm = self._sift.clip_grad_norm_(args.max_grad_norm)

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Drop the masters' gradients, also after a step that a gradient scaler skipped."""
        self._sift.zero_grad()

    def on_log(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Log the norm of the masters' gradients, since the model has none, and the sparse learning rate."""
        for entry in (given.get("logs"), state.log_history[-1]):
            if entry is not None and self._norm is not None and "grad_norm" in entry:
                entry["grad_norm"] = float(self._norm)
            if entry is not None:
                log_sparse_lr(self._sift, entry)


class SiftTrainerMixin(_Trainer):
    """Adds training, saving and resuming through a SIFT to a Trainer.

    Example:
        >>> class SiftTrainer(SiftTrainerMixin, Trainer): ...
        >>> trainer = SiftTrainer(model, args, train_dataset=data, sift=sift, base="base/")

    The optimizer is the one that the training arguments name, built from the masters, with weight
    decay on matrices only. Each save writes ``delta.sd`` and ``sift.safetensors`` instead of the
    model's weights. With these and Trainer's other files, a run resumes bit for bit on a model
    loaded from the base; other settings of the SIFT are refused then.

    With a ``SiftConfig`` nothing else need be built:

        >>> trainer = SiftTrainer(model, args, train_dataset=data, sift=SiftConfig(sparse_rate=0.01))

    Args:
        sift: the SIFT of the Trainer's model, or a ``SiftConfig``, from which the mixin builds the SIFT
            of the model that the Trainer has, on its device. With ``selection_batches``, micro-batches
            of a train loader of their own choose the components; otherwise those of the first step.
            ``gradient_accumulation_steps`` of the training arguments replaces ``grad_acc``.
        base: the checkpoint from which the model was loaded; the base of the deltas. By default the
            model as it would have been saved before the training.
        base_id: where others find the base, such as ``org/model@<commit>``.

    Raises:
        TypeError: ``sift`` is neither; or transformers has changed the methods of Trainer that the mixin replaces.
        ValueError: the base differs from the model's first weights, or has no safetensors file.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Check that the mixin comes before the Trainer whose methods it replaces.

        Raises:
            TypeError: it comes after it.
        """
        super().__init_subclass__(**kwargs)
        from transformers import Trainer  # takes seconds

        order = cls.__mro__
        if Trainer in order and order.index(Trainer) < order.index(SiftTrainerMixin):
            raise TypeError(
                f"{cls.__name__} lists Trainer before SiftTrainerMixin, which replaces methods of it; write"
                f" class {cls.__name__}(SiftTrainerMixin, Trainer)"
            )

    def __init__(
        self,
        *args: Any,
        sift: SIFT | SiftConfig,
        base: str | PathLike[str] | None = None,
        base_id: str | None = None,
        **kwargs: Any,
    ) -> None:
        for name in _REPLACED:
            if not hasattr(super(), name):
                raise TypeError(
                    f"the Trainer of this version of transformers has no method {name}; SiftTrainerMixin"
                    " replaces it, so install a version that sparsedelta supports"
                )
        if not isinstance(sift, SIFT | SiftConfig):
            raise TypeError(
                f"sift is of type {type(sift).__name__}, expected a SIFT or a SiftConfig, which has no settings of the Trainer"
            )
        self._step_of_reselection = -1
        self._sift_config = sift if isinstance(sift, SiftConfig) else None
        self._base = base
        self._base_id = base_id
        if base is None:
            logger.warning(NO_BASE)
        else:
            check_weights(Path(base))
        if isinstance(sift, SIFT):
            self._take_sift(sift)
        super().__init__(*args, **kwargs)
        self._find_sift()

    def _take_sift(self, sift: SIFT) -> None:
        check_open(sift)
        self.sift = sift
        if self._base is not None:
            check_base(sift.model, Path(self._base), sift)

    def _find_sift(self) -> None:
        """Build the SIFT of the model, unless there is one; ``model_init`` makes a new model in ``train``."""
        trained: Any = self.model
        refuse_fsdp(self.args, trained)
        if self._sift_config is None:
            refuse_other_model(self.sift, trained)
        elif not hasattr(self, "sift") or self.sift.model is not trained:
            self._take_sift(self._sift_config.build(trained))
        self.sift.grad_acc = self.args.gradient_accumulation_steps

    def create_accelerator_and_postprocess(self) -> None:
        """Make an accelerator that does not wrap the model in DistributedDataParallel."""
        refuse_fsdp(self.args, None)
        super().create_accelerator_and_postprocess()
        if not self.is_fsdp_enabled and not self.is_deepspeed_enabled:
            accelerator: Any = self.accelerator
            # accelerate wraps models that it prepares for training; all else it does is the same.
            accelerator.prepare_model = partial(accelerator.prepare_model, evaluation_mode=True)

    def create_optimizer(self, model: Any = None) -> optim.Optimizer:
        """Return the optimizer that the training arguments name, built from the masters."""
        self._find_sift()
        if self.args.fp16:
            refuse_scaler(self.sift.masters_device)
        if self.optimizer is None:
            refuse_matrix_optimizer(str(getattr(self.args.optim, "value", self.args.optim)))
            trained: Any = self.model
            make, given = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(
                self.args, trained
            )
            kwargs = dict(given)
            groups = optimizer_groups(self.sift, self.args.weight_decay, kwargs)
            self.optimizer = make(groups, **kwargs)
        self.sift.check_parameters()
        self.sift.attach(self.optimizer)
        if self._sift_config is not None and self._sift_config.reselection is not None:
            self.sift.check_reselecting(self.optimizer)
        return self.optimizer

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Train on a micro-batch; before it, choose the components or move the choice, if that is due."""
        self._select(model)
        self._reselect(model)
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        return loss

    def _select(self, model: Any) -> None:
        n = None if self._sift_config is None else self._sift_config.selection_batches
        if n is None or all(part.is_selected for part in self.sift.sparse_mapping.values()):
            return
        with kept_random_state(), self.sift.selecting():
            for inputs in islice(self.get_train_dataloader(), n):
                super().training_step(model, inputs)

    def _reselect(self, model: Any) -> None:
        """Move the choice before the first micro-batch of a step, by micro-batches of a loader of their own."""
        config, step = self._sift_config, self.state.global_step
        settings = None if config is None else find_reselection(config.reselection)
        if config is None or settings is None or step == self._step_of_reselection:
            return
        if self._step_of_reselection < 0:
            settings.warn_if_never(self.state.max_steps)
        self._step_of_reselection = step
        share = settings.share_after(step, self.state.max_steps)
        if not share or all(part.trains_all for part in self.sift.sparse_mapping.values()):
            return
        n = config.selection_batches or FitConfig.selection_batches
        # A state of its own: the batches do not depend on what a resumed run has read before.
        with seeded_random_state(self.args.seed, step):
            batches = iter(self.get_train_dataloader())
            optimizer: Any = self.optimizer
            with settings.applied(self.sift, optimizer, share):
                for inputs in islice(batches, n if needs_gradients(settings.grow) else 0):
                    super().training_step(model, inputs)
            if config.lr_transfer:
                with self.sift.measuring_share():
                    for inputs in islice(batches, n):
                        super().training_step(model, inputs)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        return self._norm_of_masters(self.args.max_grad_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        return self._norm_of_masters(float("inf")) if grad_norm is None else grad_norm

    def _norm_of_masters(self, max_norm: float) -> Any:
        self.sift.sync_gradients()  # a gradient scaler reads the masters' gradients next
        self.accelerator.unscale_gradients()
        return self.sift.clip_grad_norm_(max_norm)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir or ".")
        folder.mkdir(parents=True, exist_ok=True)
        info = {"method": "sift", "steps": self.state.global_step, "trainer": type(self).__name__}
        write_delta(
            self.sift.model,
            folder / DELTA,
            sift=self.sift,
            base=self._base,
            base_id=self._base_id,
            info={
                **info,
                "n_trained": self.sift.n_trained,
                **lr_info(self.sift, self.args.learning_rate),
                "losses": self._logged_losses(),
            },
            overwrite=True,
        )
        write_state(self.sift.state_dict(), folder / STATE_NAME, self._settings())
        processing_class: Any = self.processing_class
        if processing_class is not None:
            processing_class.save_pretrained(folder)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as Trainer does, with the learning rate of sparsely trained parameters if it is another."""
        log_sparse_lr(self.sift, logs)
        super().log(logs, start_time)

    def _logged_losses(self) -> list[list[float]]:
        logs = self.state.log_history
        return [[entry["step"], float(entry["loss"])] for entry in logs if "loss" in entry]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self._find_sift()
        expected = self.sift.n_trained
        saved = Path(resume_from_checkpoint) / STATE_NAME
        if not saved.is_file():
            raise FileNotFoundError(
                f"'{resume_from_checkpoint}' has no {STATE_NAME}, so no run with SIFT has written it; resume from a checkpoint of this"
                " run, or start from the model (resume_from_checkpoint=None)"
            )
        check_settings(saved, self._settings())
        self.sift.load(saved)
        if self.sift.n_trained != expected:
            logger.warning(
                "the checkpoint '%s' trains %d components, the settings of this run ask for %d; those of the checkpoint are"
                " trained",
                resume_from_checkpoint, self.sift.n_trained, expected,
            )  # fmt: skip

    def _settings(self) -> dict[str, Any]:
        """Return what must be the same when a run resumes, as for ``fit``."""
        config = self._sift_config
        names = () if config is None else ("selection_batches", "reselection")
        own = {name: plain(getattr(config, name)) for name in names}
        return {**self.sift.settings, "trained_by": "SiftTrainerMixin", **own}

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        if best is not None:
            self.sift.load(Path(best) / STATE_NAME)

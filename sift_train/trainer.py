"""``SiftTrainerMixin`` and ``SiftCallback``: training through a SIFT with ``transformers.Trainer``.

The masters are not parameters of the model, so Trainer neither clips, zeroes, optimizes, saves nor
resumes them. The mixin does all five. The callback clips and zeroes, for an optimizer that the
caller has built.
"""

from __future__ import annotations

from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn, optim
from transformers import TrainerCallback

from sift_train.basecheck import check_base, check_weights
from sift_train.export import write_delta
from sift_train.groups import grouped_parameters
from sift_train.sift import SIFT

if TYPE_CHECKING:
    from transformers import Trainer

    _Trainer = Trainer
else:
    _Trainer = object

DELTA, STATE = "delta.sd", "sift.safetensors"


class SiftCallback(TrainerCallback):
    """Clips and zeroes the masters' gradients; the Trainer's optimizer must hold the masters.

    Example:
        >>> optimizer = torch.optim.AdamW(sift.parameters_in_optimizer(), lr=1e-4)
        >>> Trainer(model, optimizers=(optimizer, None), callbacks=[SiftCallback(sift)])

    Trainer saves the full model at each save; ``SiftTrainerMixin`` saves a delta. With fp16 and
    several micro-batches per step, the gradient scaler reads gradients before the components are
    chosen: choose them beforehand inside ``sift.selecting()``, or use the mixin.

    Args:
        sift: the SIFT of the Trainer's model.
    """

    def __init__(self, sift: SIFT) -> None:
        self._sift = sift
        self._norm: Tensor | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Check that the optimizer trains all masters.

        Raises:
            ValueError: it lacks a master, or holds a parameter of the model.
        """
        self._sift.attach(given["optimizer"])

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Clip the gradient of the trained components to ``max_grad_norm``."""
        self._sift.sync_gradients()
        if args.max_grad_norm:
            self._norm = self._sift.clip_grad_norm_(args.max_grad_norm)

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Drop the masters' gradients, also after a step that a gradient scaler skipped."""
        self._sift.zero_grad()

    def on_log(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Log the norm of the masters' gradients, since the model itself has no gradients."""
        for entry in (given.get("logs"), state.log_history[-1]):
            if entry is not None and self._norm is not None and "grad_norm" in entry:
                entry["grad_norm"] = float(self._norm)


class SiftTrainerMixin(_Trainer):
    """Adds training, saving and resuming through a SIFT to a Trainer.

    Example:
        >>> class SiftTrainer(SiftTrainerMixin, Trainer): ...
        >>> trainer = SiftTrainer(model, args, train_dataset=data, sift=sift, base="base/")

    The optimizer is the one that the training arguments name, built from the masters, with weight
    decay on matrices only. Each save writes ``delta.sd`` and ``sift.safetensors`` instead of the
    model's weights. With these and Trainer's other files, a run resumes bit for bit on a model
    loaded from the base.

    Args:
        sift: the SIFT of the Trainer's model. Its ``grad_acc`` must equal
            ``gradient_accumulation_steps`` of the training arguments.
        base: the checkpoint from which the model was loaded; the base of the deltas. By default the
            model as it would have been saved before the training.
        base_id: where others find the base, such as ``org/model@<commit>``.

    Raises:
        ValueError: the base differs from the model's first weights, or has no safetensors file.
    """

    def __init__(
        self,
        *args: Any,
        sift: SIFT,
        base: str | PathLike[str] | None = None,
        base_id: str | None = None,
        **kwargs: Any,
    ) -> None:
        self.sift = sift
        self._base = base
        self._base_id = base_id
        if base is not None:
            check_weights(Path(base))
            check_base(sift.model, Path(base), sift)
        super().__init__(*args, **kwargs)

    def create_accelerator_and_postprocess(self) -> None:
        """Make an accelerator that does not wrap the model in DistributedDataParallel."""
        super().create_accelerator_and_postprocess()
        if not self.is_fsdp_enabled and not self.is_deepspeed_enabled:
            accelerator: Any = self.accelerator
            # accelerate wraps models that it prepares for training; all else it does is the same.
            accelerator.prepare_model = partial(accelerator.prepare_model, evaluation_mode=True)

    def create_optimizer(self, model: Any = None) -> optim.Optimizer:
        """Return the optimizer that the training arguments name, built from the masters."""
        if self.optimizer is None:
            trained: Any = self.model
            make, kwargs = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(
                self.args, trained
            )
            self.optimizer = make(grouped_parameters(self.sift, self.args.weight_decay), **kwargs)
        self.sift.attach(self.optimizer)
        return self.optimizer

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
            info={**info, "n_trained": self.sift.n_trained, "losses": self._logged_losses()},
            overwrite=True,
        )
        self.sift.save(folder / STATE)
        processing_class: Any = self.processing_class
        if processing_class is not None:
            processing_class.save_pretrained(folder)

    def _logged_losses(self) -> list[list[float]]:
        logs = self.state.log_history
        return [[entry["step"], float(entry["loss"])] for entry in logs if "loss" in entry]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.sift.load(Path(resume_from_checkpoint) / STATE)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        if best is not None:
            self.sift.load(Path(best) / STATE)

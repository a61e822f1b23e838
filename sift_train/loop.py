"""The training loop of ``fit``: selection, steps, reports, evaluations, checkpoints, stops.

All micro-batches are trained on in the order of the data, including those that choose the
components. A run that resumes from a checkpoint ends with the same bits as an uninterrupted run.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sift_train import runfolder
from sift_train.batches import BatchWindows
from sift_train.config import Evaluation, FitConfig
from sift_train.fingerprints import sums_of_others
from sift_train.interrupts import Interrupts, deferred_interrupts
from sift_train.listeners import Listener
from sift_train.losses import Losses, Step
from sift_train.optim import build_optimizer, build_schedule
from sift_train.patience import Patience
from sift_train.publishing import Publishing
from sift_train.randomness import (
    capture_random_state,
    generators_of,
    kept_random_state,
    restore_random_state,
    seeded_random_state,
)
from sift_train.ranks.batches import check_same_batches
from sift_train.ranks.fitting import has_shards, restore_shards, saved_shards, shares
from sift_train.ranks.sync import CHECK_EVERY
from sift_train.reselection import find_reselection, needs_gradients
from sift_train.sift import SIFT

if TYPE_CHECKING:
    from accelerate import Accelerator  # type: ignore[import-untyped]

logger = logging.getLogger(__name__)

Loss = Callable[[nn.Module, Any], Tensor]
Evaluate = Callable[[nn.Module], float | Mapping[str, float]]


def _log_every(device: torch.device, config: FitConfig) -> int:
    # On a CPU, reading the loss takes no time. So a bad loss is found before the step.
    return 1 if device.type == "cpu" else config.log_every


class Run:
    """One run over a model that ``sift`` trains.

    Attributes:
        evaluations: all evaluations, in order.
        stopped, kept_step, checkpoint: as in ``FitResult``.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        sift: SIFT,
        config: FitConfig,
        *,
        data: Iterable[Any],
        loss: Loss,
        n_steps: int,
        evaluate: Evaluate | None,
        folder: Path | None,
        listeners: Iterable[Listener],
        publishing: Publishing | None = None,
    ) -> None:
        from accelerate.utils import send_to_device  # type: ignore[import-untyped]

        self._send_to_device = send_to_device
        self._accelerator = accelerator
        self._sift = sift
        self._config = config
        self._reselection = find_reselection(config.reselection)
        self._data = data
        self._ranks = sift.ranks
        self._is_sharded = has_shards(sift.model)
        self._others: dict[str, int] = {}  # what the parameters that are not trained hold
        if folder is not None and not self._is_sharded:
            self._others = sums_of_others(sift.model, sift.trainable_parameters())
        self._batches = BatchWindows(data, config.accumulation * self._ranks.size)
        self._loss = loss
        self._n_steps = n_steps
        self._evaluate_model = evaluate
        self._evaluated_on = _fingerprint_of(evaluate)
        self._folder = folder
        self._listeners = tuple(listeners)
        self._publishing = publishing
        every = _log_every(accelerator.device, config)
        self._losses = Losses(sift, n_steps, every, self._listeners)
        self._interrupts = Interrupts()
        self.evaluations: list[Evaluation] = []
        self.stopped = "done"
        self.kept_step = 0
        self.checkpoint: Path | None = None
        self._patience = Patience(sift, config)

    def train(self, *, checkpoint: Path | None) -> None:
        """Do all steps, or the remaining ones after a checkpoint."""
        model = self._sift.model
        self.checkpoint = checkpoint
        was_training = model.training
        model.train()
        try:
            with self._ranks.explained(), deferred_interrupts() as self._interrupts:
                saved = None if checkpoint is None else self._load_checkpoint(checkpoint)
                if saved is None:
                    self._select()
                self._set_up()
                if saved is not None:
                    self._restore_progress(saved)
                elif self._config.eval_before:
                    self._evaluate()
                if self._publishing:
                    # A choice that moves says nothing about what changes.
                    fixed = self._sift if self._reselection is None else None
                    self._publishing.start(model, self._losses.n_done, fixed)
                stops = self._must_stop
                ended = stops or self._patience.is_lost(self.evaluations)
                n_left = 0 if ended else self._n_steps - self._losses.n_done
                for window in islice(self._batches.windows(), n_left):
                    self._reselect_if_due(window)
                    self._step(window)
                    self._evaluate_if_due()
                    stops = self._must_stop  # asked once: a run that stops here has a checkpoint
                    self._save_if_due(is_last=stops)
                    if self._publishing:
                        self._publishing.after(self._losses.n_done)
                    if stops or self._patience.is_lost(self.evaluations):
                        break
                self._losses.read()
                self._sift.may_write = None
                self.stopped = self._why_stopped(was_interrupted=stops)
                if self.stopped == "data":
                    self._end_early()
                self._keep_best()
        finally:
            model.train(was_training)

    def _keep_best(self) -> None:
        """Go back to the weights of the best evaluation, unless the run was interrupted and can resume."""
        self.kept_step = len(self.losses)
        if self.stopped != "interrupted":
            self.kept_step = self._patience.restore_best(self.evaluations, self.kept_step)
        if self._publishing and self.kept_step != len(self.losses):
            self._publishing.went_back(self.kept_step)

    def _select(self) -> None:
        """Choose the components with the first micro-batches, unless they are chosen without gradients."""
        if not all(part.is_selected for part in self._sift.sparse_mapping.values()):
            batches = self._batches.peek(self._config.selection_batches)
            self._score(batches, self._sift.selecting())

    def _score(self, batches: list[Any], collecting: AbstractContextManager[None]) -> None:
        """Run backward passes that are not trained on; restore random state."""
        check_same_batches(batches, self._ranks)
        with kept_random_state(), collecting:
            for batch, weight in self._own(batches):
                loss: Any = self._forward(batch)
                (loss if weight else loss * 0.0).backward()

    def _reselect_if_due(self, window: list[Any]) -> None:
        """Move the choice before a step, by the step's micro-batches and those that follow in the pass."""
        settings = self._reselection
        share = (
            0.0 if settings is None else settings.share_after(self._losses.n_done, self._n_steps)
        )
        parts = self._sift.sparse_mapping.values()
        if settings is None or not share or all(part.trains_all for part in parts):
            return
        self._losses.read()  # weights of a bad loss are not reverted
        n = self._config.selection_batches
        n_ranking = n if needs_gradients(settings.grow) else 0
        n_measuring = n if self._config.lr_transfer else 0
        ahead = self._batches.peek(max(n_ranking + n_measuring - len(window), 0))
        batches = [*window, *ahead]
        moving = settings.applied(self._sift, self._own_optimizer, share)
        self._score(batches[:n_ranking], moving)
        further = batches[n_ranking:][:n_measuring]
        if further:
            self._score(further, self._sift.measuring_share())

    def _own(self, batches: list[Any]) -> Iterator[tuple[Any, float]]:
        """Yield the micro-batches that this rank trains on, and how often their loss counts, 1 or 0 times."""
        return shares(batches, self._ranks, same_number=self._is_sharded)

    @property
    def _must_stop(self) -> bool:
        # All ranks must stop after the same step, so one that is interrupted tells the others.
        return self._interrupts.requested if self._ranks.size == 1 else self._losses.is_interrupted

    def _set_up(self) -> None:
        self._own_optimizer = build_optimizer(self._sift, self._config)
        self._sift.attach(self._own_optimizer)
        if self._reselection is not None:
            self._sift.check_reselecting(self._own_optimizer)
            self._reselection.warn_if_never(self._n_steps)
        # First the schedule: it wraps the optimizer's step, which accelerate then keeps.
        self._schedule = build_schedule(self._own_optimizer, self._config, self._n_steps)
        self._optimizer = self._accelerator.prepare_optimizer(self._own_optimizer)

    @property
    def losses(self) -> Sequence[float]:
        """One per optimizer step whose loss has been read from the device."""
        return self._losses.values

    def _step(self, window: list[Any]) -> None:
        lr = float(self._schedule.get_last_lr()[0])
        self._optimizer.zero_grad()
        if self._losses.n_done % CHECK_EVERY == 0:
            check_same_batches(window, self._ranks)
        loss, interrupted = self._backward(window)
        self._sift.sync_gradients()
        self._losses.check(loss)
        norm = self._clip()
        self._optimizer.step()
        if not self._optimizer.step_was_skipped:
            self._schedule.step()
        self._losses.add(Step(loss, lr, norm, interrupted))

    def _forward(self, batch: Any) -> Tensor:
        with self._accelerator.autocast():
            device = self._accelerator.device
            own = self._send_to_device(batch, device, non_blocking=device.type == "cuda")
            loss: Any = self._loss(self._sift.model, own)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise TypeError("the loss is not a tensor of one element; return the mean as a scalar")
        return loss.reshape(())

    def _backward(self, window: list[Any]) -> tuple[Tensor, Tensor]:
        """Return the mean loss over all ranks, and a number that is not 0 if a rank was interrupted."""
        ranks, n = self._ranks, len(window)
        total = torch.zeros((), device=self._accelerator.device)
        with self._own_randomness():
            for batch, weight in self._own(window):
                try:
                    loss = self._forward(batch) if weight else self._forward(batch) * 0.0
                except Exception as error:
                    error.add_note(f"This was in a batch of step {self._losses.n_done + 1}.")
                    raise
                # The mean over ranks divides by their number, also if some have no micro-batch.
                self._accelerator.backward(loss / n * ranks.size if ranks.size > 1 else loss / n)
                total += loss.detach().float() / n
        flag = total.new_full((), float(self._interrupts.requested))  # no wait for the device
        loss, interrupted = ranks.sum_(torch.stack([total, flag])).unbind()
        return loss, interrupted

    def _own_randomness(self) -> AbstractContextManager[None]:
        """Give each rank dropout of its own inside the block; the order of the data stays common."""
        if self._ranks.size == 1:
            return nullcontext()
        return seeded_random_state(self._config.seed, self._ranks.rank, self._losses.n_done)

    def _clip(self) -> Tensor | None:
        if self._config.max_grad_norm is None:
            return None
        self._accelerator.unscale_gradients()
        return self._sift.clip_grad_norm_(self._config.max_grad_norm)

    def _evaluate_if_due(self) -> None:
        step, every = self._losses.n_done, self._config.eval_every
        if step == self._n_steps or (every is not None and step % every == 0):
            self._evaluate()

    def _evaluate(self) -> None:
        if self._evaluate_model is None:
            return
        self._losses.read()
        model = self._sift.model
        model.eval()
        try:
            with kept_random_state(), torch.no_grad():
                found = self._evaluate_model(model)
            self._sift.reshard()
        finally:
            model.train()
        values = found if isinstance(found, Mapping) else {"value": found}
        try:
            plain = {name: float(value) for name, value in values.items()}
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"evaluate returned {found!r}, expected a number or a mapping of names to numbers"
            ) from error
        evaluation = Evaluation(len(self.losses), self._ranks.from_first(plain))
        self.evaluations.append(evaluation)
        self._patience.note(self.evaluations)
        for listener in self._listeners:
            listener.on_evaluation(evaluation)

    def _why_stopped(self, *, was_interrupted: bool) -> str:
        if len(self.losses) >= self._n_steps:
            return "done"
        if was_interrupted:
            return "interrupted"
        return "patience" if self._patience.is_lost(self.evaluations) else "data"

    def _end_early(self) -> None:
        """Warn, evaluate and save, after the data ended before the last step."""
        logger.warning(
            "the data ended after %d of %d steps; the delta of these steps is written. Give a list "
            "or a loader, which can be iterated over again, or lower max_steps",
            len(self.losses),
            self._n_steps,
        )
        if not self.evaluations or self.evaluations[-1].step != len(self.losses):
            self._evaluate()
        self._save_if_due(is_last=True)

    def _save_if_due(self, *, is_last: bool) -> None:
        every = self._config.save_every
        is_due = every is not None and self._losses.n_done % every == 0
        if self._folder is None or not (is_due or is_last):
            return
        self._losses.read()
        self._sift.check_ranks()
        folder = self._folder
        if not self._is_sharded:
            self.checkpoint = self._ranks.first_does(lambda: self._write_checkpoint(folder, None))
            return
        with saved_shards(self._sift, self._own_optimizer, folder) as shards:
            self.checkpoint = self._ranks.first_does(lambda: self._write_checkpoint(folder, shards))

    def _write_checkpoint(self, folder: Path, shards: Path | None) -> Path:
        scaler = self._accelerator.scaler
        optimizer = self._own_optimizer.state_dict()
        return runfolder.write(
            folder,
            len(self.losses),
            tensors=self._sift.state_dict() if shards is None else {},
            shards=shards,
            progress={
                "optimizer": optimizer if shards is None else {**optimizer, "state": {}},
                "schedule": self._schedule.state_dict(),
                "scaler": None if scaler is None else scaler.state_dict(),
                "place": self._batches.place(),
                "random": capture_random_state(generators_of(self._data)),
                "losses": self.losses,
                "evaluations": [[e.step, dict(e.values)] for e in self.evaluations],
                "evaluated_on": self._evaluated_on,
                "others": self._others,
                "best": self._patience.for_checkpoint(),
            },
            settings=self._settings(),
        )

    def _settings(self) -> dict[str, Any]:
        # These may differ when a run resumes: they do not change how it trains.
        free = {
            "log_every", "eval_every", "eval_before", "save_every", "patience", "trackers", "masters_device",
        }  # fmt: skip
        settings = {k: v for k, v in self._config.as_json().items() if k not in free}
        fingerprint = _fingerprint_of(self._data)
        if fingerprint is not None:
            settings["data.fingerprint"] = fingerprint
        if self._is_sharded:
            # Another number of ranks may go on, with as many micro-batches in a step.
            settings["accumulation"] = self._config.accumulation * self._ranks.size
            settings["sharded"] = True
        elif self._ranks.size > 1:
            settings["n_ranks"] = self._ranks.size
        return {**settings, "n_steps": self._n_steps}

    def _load_checkpoint(self, checkpoint: Path) -> dict[str, Any]:
        tensors, progress = runfolder.read(checkpoint, self._settings())
        if self._is_sharded:
            progress["shards"] = checkpoint / runfolder.SHARDS
        else:
            self._sift.load_state_dict(tensors)
        return progress

    def _restore_progress(self, progress: dict[str, Any]) -> None:
        if self._is_sharded:
            groups = progress["optimizer"]["param_groups"]
            restore_shards(self._sift, self._own_optimizer, groups, progress["shards"])
        else:
            self._own_optimizer.load_state_dict(progress["optimizer"])
        self._schedule.load_state_dict(progress["schedule"])
        if self._accelerator.scaler is not None and progress["scaler"]:
            self._accelerator.scaler.load_state_dict(progress["scaler"])
        self._losses.values = list(progress["losses"])
        self.evaluations = [Evaluation(step, values) for step, values in progress["evaluations"]]
        before, now = progress.get("evaluated_on"), self._evaluated_on
        if before and now and before != now:
            raise ValueError(
                "the run was evaluated on other examples, and the scores would not compare; resume with the same evaluation,"
                " without one, or start a new run"
            )
        self._evaluated_on = now or before
        others = progress.get("others") or {}
        changed = [name for name, bits in self._others.items() if others.get(name, bits) != bits]
        if changed:
            logger.warning(
                "%d of the parameters that are not trained, such as %r, are not as they were when the saved run began; if the base has"
                " changed, start a new run", len(changed), changed[0],
            )  # fmt: skip
        self._patience.load(progress["best"], self.evaluations, len(self.losses))
        self._batches.go_to(progress["place"])
        restore_random_state(progress["random"], generators_of(self._data))


def _fingerprint_of(given: object) -> str | None:
    """Return the text that the caller's data or evaluation has as ``fingerprint``; None if it has none."""
    found = getattr(given, "fingerprint", None)
    return found if isinstance(found, str) else None

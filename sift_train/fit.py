"""``fit``: trains a sparse set of components with accelerate and writes the delta.

Arguments are checked before training where that is possible. The target of the delta has the
weights that the model has after the last step, or with ``patience`` after the best evaluation.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import ExitStack, contextmanager, nullcontext
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sift_train import runfolder
from sift_train.basecheck import check_base
from sift_train.config import Evaluation, FitConfig, FitResult, StepReport
from sift_train.export import NO_BASE, check_outputs, export_delta, write_delta
from sift_train.groups import lr_info
from sift_train.known import names_checked
from sift_train.listeners import Callbacks, Listener, Report, Tracker, shown_steps
from sift_train.loading import hidden_progress_bars, load_model
from sift_train.loop import Evaluate, Loss, Run
from sift_train.publishing import Publishing
from sift_train.ranks.fitting import check_sharded_fit, has_shards
from sift_train.ranks.group import expected_size, launched_processes
from sift_train.sift import SIFT
from sift_train.starting import check_start
from sift_train.targets import check_saves_weights
from sift_train.yaml_files import names_of

if TYPE_CHECKING:
    from accelerate import Accelerator  # type: ignore[import-untyped]

logger = logging.getLogger(__name__)
CURVE_POINTS = 500


@names_checked(
    elsewhere=names_of(FitConfig), where="a setting of FitConfig, which is given as config="
)
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
    evaluate: Evaluate | None = None,
    on_step: Callable[[StepReport], None] | None = None,
    on_evaluation: Callable[[Evaluation], None] | None = None,
    progress: bool = False,
    run_dir: str | PathLike[str] | None = None,
    resume: bool = False,
) -> FitResult:
    """Train a sparse set of the model's components, write the delta, and return the result.

    A model given as a module is trained in place and keeps the trained weights. Random number
    generators are seeded. Ctrl-C or SIGTERM, which job schedulers send, ends the training after the current
    step, and the delta is still written. A further Ctrl-C raises ``KeyboardInterrupt`` at once. A handler of
    SIGTERM that the program has installed is left alone.

    Started by ``torchrun`` or ``accelerate launch``, the ranks train together. Every rank is given the
    same data and reads all of it; each trains on its share of the micro-batches of a step. Rank 0
    evaluates for the decisions and writes all files, and all ranks return the same result. A model that
    ``fully_shard`` has divided among all ranks is trained as it is; ``base`` is then needed.

    Args:
        model: a folder of a transformers model, or a module. A module is moved to the device that
            accelerate chooses.
        data: micro-batches, such as a DataLoader; it is iterated over once per pass. If it has a text as ``fingerprint``,
            a run resumes only with data of the same fingerprint.
        output: path of the delta to write.
        config: settings; by default ``FitConfig()``.
        loss: a function of the model and a micro-batch (on the model's device) that returns a
            scalar tensor. By default the batch must be a mapping of keyword arguments, and the
            model's output must have a ``loss``.
        base: the checkpoint from which the module was loaded; its weights are compared with the
            module's. By default the folder given as ``model``. If the model is a module, the
            default base is the module as it would have been saved before the training: the delta then
            fits no checkpoint on disk that has other bits, and a warning is logged.
        base_id: where others find the base, such as ``org/model@<commit>``; recorded as a hint.
        save_target: path at which the trained checkpoint is kept; by default it is not kept.
        overwrite: replace existing files or folders at ``output`` and ``save_target``.
        evaluate: a function of the model that returns a number, or a mapping of names to numbers.
            It is called in evaluation mode, without gradients. Random state is restored afterwards. If it has a
            text as ``fingerprint``, a run resumes only with one of the same fingerprint, or without evaluation.
        on_step: called with the report of every optimizer step; on a GPU ``log_every`` reports
            come together.
        on_evaluation: called with the result of every evaluation.
        progress: show on standard error what is being done, and a progress bar of the steps; where there is no
            terminal, lines with losses, at most one in ten seconds, and evaluations.
        run_dir: folder for checkpoints and trackers' logs; created if missing. Without ``resume`` it must hold no
            checkpoint.
        resume: resume from the newest checkpoint in ``run_dir``, if there is one. The delta that was written when
            the run was interrupted is replaced. The result has
            the same bits as that of an uninterrupted run, if every ``iter(data)`` gives the same
            order under the same random state.

    Raises:
        FileExistsError: ``output`` or ``save_target`` exists and ``overwrite`` is not set; or ``run_dir`` holds a
            checkpoint and ``resume`` is not set.
        FileNotFoundError: the base, or the folder of an output, does not exist.
        IsADirectoryError, NotADirectoryError, PermissionError: an output or ``run_dir`` cannot be written where it is.
        TypeError: the data is a path; ``config`` is no FitConfig, ``model`` no model, ``evaluate`` returns no numbers,
            the model's output has no loss, or the data has no length and ``max_steps`` is not set.
        ValueError: an argument is out of range; a parameter cannot be trained in place; the base
            differs from the model's first weights or has no safetensors file; the data is empty;
            the loss is infinite or NaN; or the checkpoint belongs to a run with other settings.
        OSError, SparseDeltaError: the last step could not be published; the delta is written.
    """
    config = FitConfig() if config is None else config
    if not isinstance(config, FitConfig):
        raise TypeError(
            f"config is of type {type(config).__name__}, expected FitConfig; write FitConfig(name=value, …), and a dict of"
            " settings as FitConfig(**settings)"
        )
    if not isinstance(model, nn.Module | str | PathLike):
        raise TypeError(
            f"model is of type {type(model).__name__}, expected a module or the folder of one; the order is fit(model, data)"
        )
    _check_data(data)
    source = None if isinstance(model, nn.Module) else model
    start = check_start(
        config,
        output=output,
        base=base,
        save_target=save_target,
        run_dir=run_dir,
        resume=resume,
        overwrite=overwrite,
        evaluates=evaluate is not None,
    )
    folder, checkpoint, overwrite = start.folder, start.checkpoint, start.overwrite
    n_steps = _count_steps(data, config, expected_size())
    report = Report(shown=progress)
    if not isinstance(model, nn.Module):
        base = model if base is None else base
        report(f"loading '{model}'")
        import transformers  # noqa: F401 - takes seconds; hidden_progress_bars needs it loaded

        with nullcontext() if report.has_bars else hidden_progress_bars():
            model = load_model(model)
    is_sharded = has_shards(model)
    check_saves_weights(model, may_be_sharded=expected_size() > 1)
    _check_not_compiled(model)
    check_outputs(model, output, base=base, save_target=save_target, overwrite=overwrite)
    if base is not None and base != source and checkpoint is None and not is_sharded:
        report(f"comparing the model with '{base}'")
        check_base(model, Path(base))
    began = time.perf_counter()
    with ExitStack() as stack:
        accelerator = stack.enter_context(_accelerator(config, folder))
        if not is_sharded:
            model.to(accelerator.device)
        report("choosing the components")
        sift = stack.enter_context(_sift(model, config))
        if is_sharded:
            check_sharded_fit(sift, base, compare=checkpoint is None)
        if base is None and sift.ranks.is_first:
            logger.warning(NO_BASE)
        listeners: list[Listener] = [Callbacks(on_step, on_evaluation)]
        if config.trackers:
            listeners.append(Tracker(accelerator, config.as_json()))
        if progress and sift.ranks.is_first:
            n_done = 0
            if checkpoint is not None:
                report(f"resuming from '{checkpoint}'")
                n_done = runfolder.step_of(checkpoint)
            shown = shown_steps(n_steps, n_done=n_done, report=report)
            listeners.append(stack.enter_context(shown))
        publishing = None
        if config.publish is not None:
            if sift.ranks.size > 1:
                raise ValueError(
                    f"publish works with one process, and there are {sift.ranks.size}; publish the delta afterwards"
                )
            publishing = stack.enter_context(Publishing(config.publish, config.publish_every, base))
        run = Run(
            accelerator,
            sift,
            config,
            data=data,
            loss=loss or _loss_of_output,
            n_steps=n_steps,
            evaluate=evaluate,
            folder=folder,
            listeners=listeners,
            publishing=publishing,
        )
        run.train(checkpoint=checkpoint)
        trained = time.perf_counter()
        if run.kept_step != len(run.losses):
            report(f"keeping the weights after step {run.kept_step}, of the best evaluation")
        sift.check_ranks()
        trained_model, from_base = model, base

        def export() -> int:
            write = export_delta if is_sharded else write_delta
            return write(
                trained_model,
                output,
                sift=sift,
                base=from_base,
                base_id=base_id,
                info=_info(config, sift, run),
                save_target=save_target,
                overwrite=overwrite,
            )

        report(f"writing '{output}'")
        with nullcontext() if report.has_bars else hidden_progress_bars():
            # All ranks of a sharded model write its delta together.
            nnz = export() if is_sharded else sift.ranks.first_does(export)
            delta_bytes = sift.ranks.first_does(lambda: Path(output).stat().st_size)
        if publishing:
            publishing.finish(_remedy(output, save_target))
    if run.stopped == "interrupted" and sift.ranks.is_first:
        logger.warning("%s", _how_to_continue(run, n_steps, folder))
    return FitResult(
        delta=Path(output),
        delta_bytes=delta_bytes,
        target=None if save_target is None else Path(save_target),
        n_trained=sift.n_trained,
        n_total=sift.n_total,
        nnz=nnz,
        losses=tuple(run.losses),
        train_seconds=trained - began,
        export_seconds=time.perf_counter() - trained,
        kept_step=run.kept_step,
        evaluations=tuple(run.evaluations),
        stopped=run.stopped,
        checkpoint=run.checkpoint,
    )


def _how_to_continue(run: Run, n_steps: int, folder: Path | None) -> str:
    """Return the sentence for a user who has interrupted a run."""
    at = f"interrupted after step {len(run.losses)} of {n_steps}"
    if run.checkpoint is not None:
        return f"{at}; to continue, start the same run again and resume it (resume=True, --resume)"
    way_out = "; give run_dir to get one" if folder is None else ""
    return f"{at}; there is no checkpoint to continue from{way_out}"


def _remedy(output: str | PathLike[str], save_target: str | PathLike[str] | None) -> str:
    """Return how to publish the result of a training by hand, as a clause."""
    kept = f"the delta is '{output}'"
    if save_target is None:
        return f"{kept}: apply it to the base, and give the result to `sparsedelta publish`"
    return f"{kept}; give the trained checkpoint, '{save_target}', to `sparsedelta publish`"


def _sift(model: nn.Module, config: FitConfig) -> SIFT:
    return SIFT(
        model,
        config.sparse_rate,
        config.sparse_module,
        config.exception,
        gradient_checkpointing=config.gradient_checkpointing,
        selection=config.selection,
        budget=config.budget,
        block=config.block,
        seed=config.seed,
        reduce_dtype=torch.bfloat16 if config.reduce_dtype == "bf16" else None,
        lr_transfer=config.lr_transfer,
        masters=config.masters,
        masters_device=config.masters_device,
    )


def _check_not_compiled(model: nn.Module) -> None:
    if hasattr(model, "_orig_mod"):
        raise ValueError(
            "model is wrapped by torch.compile, so its parameters have other names than in the base;"
            " give the model itself and call model.compile(), which compiles it in place"
        )


def _loss_of_output(model: nn.Module, batch: Any) -> Tensor:
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"batch is of type {type(batch).__name__}, expected a mapping of the model's arguments to tensors, such as"
            " {'input_ids': …, 'labels': …}; make such batches, as a DataLoader with a collator does, or give fit a"
            " loss function (loss=) for these"
        )
    try:
        output = model(**batch)
    except (AttributeError, TypeError) as error:
        name = next((name for name, held in batch.items() if isinstance(held, list)), None)
        if name is None:
            raise
        raise TypeError(
            f"batch has a list as {name!r}, and {type(model).__name__} cannot use it ({error}); give tensors, as a"
            " DataLoader with a collator does"
        ) from error
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if not isinstance(loss, Tensor):
        way_out = "put labels in the batch"
        if "labels" in batch:
            way_out = "give a model with a head that computes one, such as an AutoModelFor… of transformers"
        raise TypeError(
            f"the output of {type(model).__name__} has no loss; {way_out}, or give fit a loss function"
        )
    return loss


def _check_data(data: Iterable[Any]) -> None:
    """Raise TypeError if the data is the path of a file, or cannot be iterated over."""
    if isinstance(data, str | PathLike):
        raise TypeError(
            f"data is the path '{os.fspath(data)}', expected micro-batches, such as a DataLoader; make them from the file,"
            " or train from a YAML file, which reads it (python -m sift_train --config run.yaml)"
        )
    if not hasattr(data, "__iter__") and not hasattr(data, "__getitem__"):
        raise TypeError(
            f"data is of type {type(data).__name__}, expected micro-batches, such as a list or a DataLoader"
        )


def _count_steps(data: Iterable[Any], config: FitConfig, n_ranks: int) -> int:
    if config.max_steps is not None:
        return config.max_steps
    if not isinstance(data, Sized):
        raise TypeError(f"data is of type {type(data).__name__} without a length; set max_steps")
    if len(data) == 0:
        raise ValueError("the data has no batch; give at least one")
    return config.epochs * math.ceil(len(data) / (config.accumulation * n_ranks))


def _info(config: FitConfig, sift: SIFT, run: Run) -> dict[str, Any]:
    return {
        "method": "sift",
        "settings": config.as_json(),
        "steps": len(run.losses),
        **({} if run.kept_step == len(run.losses) else {"kept_step": run.kept_step}),
        "stopped": run.stopped,
        "n_trained": sift.n_trained,
        "n_total": sift.n_total,
        **lr_info(sift, config.lr),
        "losses": _loss_curve(run.losses),
        # Without those of later weights: the last one is that of the delta.
        "evaluations": [
            {
                "step": e.step,
                "values": {n: v if math.isfinite(v) else None for n, v in e.values.items()},
            }
            for e in run.evaluations
            if e.step <= run.kept_step
        ],
    }


def _loss_curve(losses: Sequence[float]) -> list[list[float]]:
    """Return (last step, mean loss) of at most ``CURVE_POINTS`` spans of equal length."""
    span = max(1, math.ceil(len(losses) / CURVE_POINTS))
    parts = [losses[at : at + span] for at in range(0, len(losses), span)]
    ends = [min((number + 1) * span, len(losses)) for number in range(len(parts))]
    return [[end, round(sum(part) / len(part), 6)] for end, part in zip(ends, parts, strict=True)]


@contextmanager
def _accelerator(config: FitConfig, folder: Path | None) -> Iterator[Accelerator]:
    """Seed all random generators and yield an accelerator; restore accelerate's process-wide state afterwards.

    The state is cleared first: an earlier Trainer leaves its settings there, and a new accelerator
    could not use others.
    """
    from accelerate import Accelerator  # takes half a second
    from accelerate.state import AcceleratorState  # type: ignore[import-untyped]
    from accelerate.utils import set_seed  # type: ignore[import-untyped]

    shared: dict[str, Any] = AcceleratorState._shared_state
    before = dict(shared)
    shared.clear()
    try:
        accelerator = Accelerator(
            cpu=True if launched_processes() > 1 and not torch.cuda.is_available() else None,
            mixed_precision=config.mixed_precision,
            log_with=list(config.trackers) or None,
            project_dir=None if folder is None else str(folder),
        )
        set_seed(config.seed)
        yield accelerator
        if config.trackers:
            accelerator.end_training()
    finally:
        shared.clear()
        shared.update(before)

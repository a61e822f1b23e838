"""What can be checked of a run before its model is loaded: its outputs, its folder, its checkpoint."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import sparsedelta
from sift_train import runfolder
from sift_train.config import FitConfig
from sift_train.masks import is_mask

AnyPath = str | PathLike[str]


@dataclass(frozen=True)
class Start:
    """Where a run begins.

    Attributes:
        folder: the folder of its checkpoints, None if there is none.
        checkpoint: the checkpoint to resume from, None for a new run.
        overwrite: whether existing outputs are replaced.
    """

    folder: Path | None
    checkpoint: Path | None
    overwrite: bool


def check_start(
    config: FitConfig,
    *,
    output: AnyPath,
    base: AnyPath | None,
    save_target: AnyPath | None,
    run_dir: AnyPath | None,
    resume: bool,
    overwrite: bool,
    evaluates: bool,
) -> Start:
    """Return where a run begins, after all checks that need no model.

    The arguments are those of ``fit``; ``evaluates`` is whether there is a function that evaluates.

    Raises:
        FileExistsError, FileNotFoundError, ValueError: as ``fit``.
        OSError: an output is a folder, or cannot be written.
    """
    _check_evaluates(config, evaluates=evaluates)
    _check_mask(config)
    folder = _run_folder(config, run_dir, resume=resume)
    checkpoint = runfolder.newest(folder) if folder else None
    if checkpoint is not None and not resume:
        raise FileExistsError(
            f"run_dir '{run_dir}' holds a checkpoint of an earlier run, after step {runfolder.step_of(checkpoint)}; resume"
            " that run (resume=True, --resume), choose another run_dir, or delete this one"
        )
    if checkpoint is not None and os.path.lexists(output) and not overwrite:
        overwrite = _is_of_interrupted_run(output, runfolder.step_of(checkpoint))
        if not overwrite:
            raise FileExistsError(
                f"output '{output}' exists, so the run in '{run_dir}' seems to be finished; to write the output again from"
                " its last checkpoint, overwrite it (overwrite=True, --overwrite); for a new run, choose another run_dir"
                " and another output"
            )
    check_paths(output, base=base, save_target=save_target, overwrite=overwrite)
    for given in (output, save_target):
        if (
            folder
            and given
            and Path(given).resolve() in (folder.resolve(), *folder.resolve().parents)
        ):
            raise ValueError(
                f"output '{given}' is, or is around, run_dir '{run_dir}'; give a path elsewhere"
            )
    return Start(folder, checkpoint, overwrite)


def _check_mask(config: FitConfig) -> None:
    given = config.selection
    if isinstance(given, str | PathLike) and is_mask(given) and not os.path.isfile(given):
        raise FileNotFoundError(
            f"selection is '{os.fspath(given)}', and there is no such file; give the path of a mask or a delta, or the name of a rule"
        )


def check_paths(
    output: AnyPath, *, base: AnyPath | None, save_target: AnyPath | None, overwrite: bool
) -> None:
    """Check the paths of a run or an export before any work is done.

    Raises:
        FileExistsError: ``output`` or ``save_target`` exists and ``overwrite`` is not set.
        FileNotFoundError: the base, or the folder of an output, does not exist.
        IsADirectoryError: ``output`` is a folder, or ends in a slash.
        PermissionError: the folder of an output cannot be written.
        ValueError: ``output`` and ``save_target`` are the same path, or one is in the base or around it.
    """
    name = os.fspath(output)
    ends_as_folder = name.endswith(("/", os.sep))
    if ends_as_folder or os.path.isdir(name):
        is_said = "is written like" if ends_as_folder else "is"
        example = Path(name) / "delta.sd"
        raise IsADirectoryError(
            f"output '{output}' {is_said} a folder, but the output is one file; give the name of a"
            f" file, such as '{example}'"
        )
    if save_target is not None and os.path.realpath(save_target) == os.path.realpath(output):
        raise ValueError(f"output and save_target are both '{output}'; give two paths")
    check_apart((output, save_target), {"the base": base})
    for given in (output, save_target):
        if given is None:
            continue
        is_special = os.path.exists(given) and not (os.path.isfile(given) or os.path.isdir(given))
        if is_special:
            raise FileExistsError(
                f"output '{given}' is a device, pipe or socket, which would be replaced; give the name of a file"
            )
        if os.path.lexists(given) and not overwrite:
            raise FileExistsError(
                f"output '{given}' exists; choose another name, or overwrite it (overwrite=True, --overwrite)"
            )
        parent = Path(os.path.abspath(given)).parent
        if not parent.is_dir():
            raise FileNotFoundError(
                f"the folder of output '{given}' does not exist; create it first"
            )
        _check_writable(parent, f"output '{given}'")
    if base is not None and not Path(base).exists():
        raise FileNotFoundError(f"base '{base}' does not exist")


def check_apart(outputs: Iterable[AnyPath | None], inputs: Mapping[str, AnyPath | None]) -> None:
    """Check that no output is, is in, or is around what a run reads; it would be changed or replaced.

    Args:
        outputs: paths that the run writes.
        inputs: paths that it reads, by what they are. Those that do not exist are left out.

    Raises:
        ValueError: an output is not apart.
    """
    for output, (what, given) in itertools.product(outputs, inputs.items()):
        if output is None or given is None or not os.path.exists(given):
            continue
        own, read = Path(output).resolve(), Path(given).resolve()
        if own == read or own in read.parents or read in own.parents:
            where = "" if own == read else "a folder around " if own in read.parents else "in "
            raise ValueError(
                f"output '{output}' is {where}{what}, '{given}', which the run reads; give a path elsewhere"
            )


def _run_folder(config: FitConfig, run_dir: AnyPath | None, *, resume: bool) -> Path | None:
    """Return the folder of checkpoints, which is created later."""
    if run_dir is not None:
        folder = Path(os.path.abspath(run_dir))
        existing = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
        if not existing.is_dir():
            raise NotADirectoryError(
                f"run_dir '{run_dir}' cannot be a folder, because '{existing}' is a file; choose another run_dir"
            )
        _check_writable(existing, f"run_dir '{run_dir}'")
        return Path(run_dir)
    for is_set, name in ((resume, "resume"), (config.save_every, "save_every")):
        if is_set:
            raise ValueError(f"{name} needs a folder for checkpoints; give run_dir")
    if config.trackers:
        raise ValueError("trackers need a folder for their logs; give run_dir")
    return None


def _check_writable(folder: Path, what: str) -> None:
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(
            f"{what} cannot be written, because you may not write to the folder '{folder}'; choose another path"
        )


def _check_evaluates(config: FitConfig, *, evaluates: bool) -> None:
    """Raise ValueError if settings are about evaluations, and there is no function that evaluates."""
    given = [name for name in ("eval_every", "eval_before", "patience") if getattr(config, name)]
    if given and not evaluates:
        raise ValueError(
            f"{given[0]} is {getattr(config, given[0])!r}, but there is no evaluate (in a YAML file: evaluation); give"
            " both, or neither"
        )
    if config.patience is not None and config.eval_every is None:
        raise ValueError(
            f"patience is {config.patience}, but without eval_every there is one evaluation, after the last step; give both"
        )


def _is_of_interrupted_run(output: AnyPath, step: int) -> bool:
    """Return whether an output is the delta that a run wrote when it was interrupted after a step."""
    try:
        with sparsedelta.load(output) as delta:
            return (delta.info.get("stopped"), delta.info.get("steps")) == ("interrupted", step)
    except (OSError, ValueError, sparsedelta.SparseDeltaError):
        return False

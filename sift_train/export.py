"""Writes the delta from the base to a trained model.

The trained model is saved as a complete checkpoint, with the base's tokenizer and other files, so
that the checkpoint that ``apply`` rebuilds can be loaded without further files.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file, save_model
from torch import nn

import sparsedelta
from sift_train.basecheck import (
    check_base,
    check_weights,
    model_folder,
    names_in_base,
    tensor_names,
    weight_files,
)
from sift_train.changes import mean_changes
from sift_train.groups import lr_info
from sift_train.pipelines import copy_rest, keep_config
from sift_train.ranks.export import check_shards, mean_changes_of_shards
from sift_train.ranks.shard import is_sharded
from sift_train.readback import check_reads_back
from sift_train.sift import SIFT
from sift_train.starting import check_paths
from sift_train.targets import check_saves_weights
from sift_train.weightfiles import dtype_of, weights_of

logger = logging.getLogger(__name__)

WEIGHT_SUFFIXES = (
    ".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".ckpt",
    ".h5", ".msgpack", ".onnx", ".gguf", ".ot", ".pb", ".tflite",
)  # fmt: skip

PLAIN_NAME = "model.safetensors"
NO_BASE = (
    "no base is given: the delta starts from the weights that the model has now, and can be applied only to a checkpoint with"
    " the same bits and files; give the checkpoint that the model was loaded from (base=), or save the model before the"
    " training"
)


def export_delta(
    model: nn.Module,
    output: str | PathLike[str],
    *,
    sift: SIFT | None = None,
    base: str | PathLike[str] | None = None,
    base_id: str | None = None,
    info: Mapping[str, Any] | None = None,
    save_target: str | PathLike[str] | None = None,
    overwrite: bool = False,
) -> int:
    """Write the delta from the base to the model's current weights; return its nnz.

    If several ranks each hold the whole model that ``sift`` trains, rank 0 writes the delta, also if all call this; the others
    return 0 at once.

    A model of transformers or diffusers is saved as a folder, any other module as one safetensors
    file. Tensors
    are saved under the names that ``base`` uses, with or without the model's prefix.

    If ranks divide the model (FSDP2, tensor parallelism), all ranks must call this and see the base, and ``sift`` and ``base``
    are needed. No rank gathers a tensor: each rank codes the changes of its own rows, and rank 0 writes the file
    (``sparsedelta.distributed.diff_shards``). Buffers and other files are those of the base.

    Args:
        model: the trained model.
        output: path of the delta to write; its folder must exist.
        sift: the SIFT that trained the model. If ``base`` is not given, the base is the model with
            its first weights, which ``sift`` has kept; the delta then fits only a checkpoint with the same
            bits. If it is given, it is compared with the
            model's first weights. Leave ``sift`` out to write a delta between any base and model.
        base: the checkpoint with which the training began: a folder for a model of transformers or
            diffusers, a safetensors file for any other module. If it is the folder of a pipeline of diffusers,
            the delta is that of the pipeline, with the model in its subfolder.
        base_id: where others find the base, such as ``org/model@<commit>``.
        info: plain JSON, recorded in the delta. With ``sift``, the key ``mean_change`` is added:
            for each tensor, the mean absolute change of its changed components. With ``lr_transfer``, the
            share of the gradient is added.
        save_target: path at which the trained checkpoint is kept; by default it is not kept.
        overwrite: replace existing files or folders at ``output`` and ``save_target``.

    Raises:
        FileExistsError: ``output`` or ``save_target`` exists and ``overwrite`` is not set.
        FileNotFoundError: the base, or the folder of an output, does not exist.
        TypeError: ``model`` is no module.
        ValueError: neither ``base`` nor ``sift`` is given, the base is of the wrong kind, or it
            differs from the first weights that ``sift`` has kept; the model is wrapped, sharded, or has PEFT
            adapters; or transformers would not load the weights that it saves.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model is of type {type(model).__name__}, expected a module; the order is export_delta(model, output)"
        )
    model = getattr(model, "_orig_mod", model)  # without the wrapper of torch.compile
    if sift is not None:
        sift.reshard()  # FSDP2 leaves the root's parameters whole after a forward pass
        own = getattr(sift.model, "_orig_mod", sift.model)
        if own is not model and set(sift.trainable_parameters()).isdisjoint(model.parameters()):
            raise ValueError(
                f"sift trains another {type(sift.model).__name__} than the model that is given, which may be a copy; give"
                " sift.model, or leave sift out and give the base"
            )
    if sift is not None and any(is_sharded(parameter) for parameter in model.parameters()):
        check_saves_weights(model, may_be_sharded=True)
        return _export_shards(
            sift,
            output,
            base=base,
            base_id=base_id,
            info=info,
            save_target=save_target,
            overwrite=overwrite,
        )
    check_saves_weights(model)
    if sift is not None and not sift.ranks.is_first:
        logger.info("rank 0 writes '%s'; this rank holds the same model and writes nothing", output)
        return 0
    check_outputs(model, output, base=base, save_target=save_target, overwrite=overwrite)
    if base is None and sift is None:
        raise ValueError("no base is given; give base, or the sift that trained the model")
    if sift is not None:
        sift.check_parameters()
        if base is not None:
            check_base(model, Path(base), sift)
    return write_delta(
        model,
        output,
        sift=sift,
        base=base,
        base_id=base_id,
        info=info,
        save_target=save_target,
        overwrite=overwrite,
    )


def _export_shards(
    sift: SIFT,
    output: str | PathLike[str],
    *,
    base: str | PathLike[str] | None,
    base_id: str | None,
    info: Mapping[str, Any] | None,
    save_target: str | PathLike[str] | None,
    overwrite: bool,
) -> int:
    check_outputs(sift.model, output, base=base, save_target=save_target, overwrite=overwrite)
    if base is None:
        raise ValueError("the model is sharded, so no rank can save it as the base; give base")
    base_path = Path(os.path.abspath(base))
    from sparsedelta.distributed import diff_shards  # imports torch.distributed.checkpoint

    sift.reshard()
    own_base = model_folder(sift.model, base_path, sift)
    places = check_shards(sift, own_base)
    top = base_path if base_path.is_dir() else base_path.parent
    delta = diff_shards(
        base_path,
        {(p.relative_to(top).as_posix(), name): tensor for (p, name), tensor in places.items()},
        base_id=base_id,
        info=_with_mean_change(_with_lr(info, sift), mean_changes_of_shards(sift, own_base)),
        strict=False,
        group=sift.ranks.group,
    )
    final = Path(os.path.abspath(output))

    def save(delta: sparsedelta.Delta) -> int:
        with delta, _work_folder(final, "target") as work:
            nnz = _saved(delta, final, overwrite=overwrite)
            if save_target is not None:
                sparsedelta.apply(base_path, delta, work / base_path.name)
                _move(work / base_path.name, Path(os.path.abspath(save_target)))
            return nnz

    return sift.ranks.first_does(lambda: save(delta) if delta else 0)


def write_delta(
    model: nn.Module,
    output: str | PathLike[str],
    *,
    sift: SIFT | None,
    base: str | PathLike[str] | None,
    base_id: str | None,
    info: Mapping[str, Any] | None,
    save_target: str | PathLike[str] | None = None,
    overwrite: bool,
) -> int:
    """Write the delta as ``export_delta`` does, without checking the arguments or the base.

    Raises:
        OSError: a file cannot be written.
        ValueError: base and model cannot be compared, or the model no longer uses a trained parameter.
    """
    final = Path(os.path.abspath(output))
    if sift is not None:
        sift.check_parameters()
    with ExitStack() as stack:
        if base is None and sift is not None:
            base_path = stack.enter_context(_work_folder(final, "base"))
            with sift.reverted(), _temporary_config(model, sift.first_config):
                base_path = _save(model, base_path, None)
        else:
            base_path = Path(os.path.abspath(str(base)))
        work = stack.enter_context(_work_folder(final, "target"))
        has_base = base is not None
        own_base = model_folder(model, base_path, sift) if has_base else base_path
        if own_base == base_path:
            target = own_target = _save(model, work, base_path if has_base else None)
        else:
            target = work / "checkpoint"
            own_target = target / own_base.relative_to(base_path)
            _save_part(model, own_target, own_base)
            used = weights_of(own_base, dtype_of(model))
            left_out = {*used.files, *used.indexes}
            copy_rest(base_path, target, left_out=left_out, links=save_target is None)
        means = {}
        if sift is not None:
            means = mean_changes(sift, model, base=own_base, target=own_target, is_renamed=has_base)
        delta = stack.enter_context(
            sparsedelta.diff(
                base_path,
                target,
                base_id=base_id,
                info=_with_mean_change(_with_lr(info, sift), means),
            )
        )
        nnz = _saved(delta, final, overwrite=overwrite)
        if save_target is not None:
            _move(target, Path(os.path.abspath(save_target)))
    return nnz


def _saved(delta: sparsedelta.Delta, path: Path, *, overwrite: bool) -> int:
    """Write a delta, warn if it changes nothing, and return its nnz."""
    delta.save(path, overwrite=overwrite)
    nnz = delta.nnz
    if not nnz:
        logger.warning(
            "the delta '%s' changes no weight: the model has the weights of its base; check that it was trained, and with a"
            " learning rate that its dtype can represent",
            path,
        )
    return nnz


def check_outputs(
    model: nn.Module,
    output: str | PathLike[str],
    *,
    base: str | PathLike[str] | None,
    save_target: str | PathLike[str] | None,
    overwrite: bool,
) -> None:
    """Check the paths of an export before any work is done.

    Raises:
        OSError, ValueError: as ``check_paths``.
        ValueError: the base is of the wrong kind, or has no safetensors file.
    """
    check_paths(output, base=base, save_target=save_target, overwrite=overwrite)
    if base is None:
        return
    base_path = Path(base)
    if _is_transformers(model) != base_path.is_dir():
        expected = "folder" if _is_transformers(model) else "safetensors file"
        other_way = (
            "; or save it with its own library and compare the folders (sparsedelta.diff)"
            if base_path.is_dir()
            else ""
        )
        raise ValueError(
            f"base '{base_path}' is not a {expected}, but a {type(model).__name__} is saved as "
            f"one; give one, or leave base out{other_way}"
        )
    check_weights(base_path)


def _with_mean_change(info: Mapping[str, Any] | None, means: Mapping[str, float]) -> dict[str, Any]:
    """Return the info with each tensor's ``mean_change``, which a delta alone does not contain."""
    known = {name: float(f"{mean:.3g}") for name, mean in means.items()}
    return {"mean_change": known, **(info or {})} if known else dict(info or {})


def _with_lr(info: Mapping[str, Any] | None, sift: SIFT | None) -> dict[str, Any]:
    return {**({} if sift is None else lr_info(sift)), **(info or {})}


def _is_transformers(model: nn.Module) -> bool:
    return hasattr(model, "save_pretrained") and hasattr(model, "config")


@contextmanager
def _temporary_config(model: nn.Module, config: Any) -> Iterator[None]:
    """Give a model its first config inside the block; some models edit theirs in a forward pass."""
    if config is None or isinstance(
        getattr(type(model), "config", None), property
    ):  # cannot be set
        yield
        return
    holder: Any = model
    own = holder.config
    holder.config = config
    try:
        yield
    finally:
        holder.config = own


@contextmanager
def _work_folder(final: Path, purpose: str) -> Iterator[Path]:
    work = tempfile.mkdtemp(prefix=f".{final.name[:64]}.", suffix=f".{purpose}", dir=final.parent)
    try:
        yield Path(work)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _save(model: nn.Module, work: Path, base: Path | None) -> Path:
    if not _is_transformers(model):
        # Any file name works, because a delta ignores the name of a base that is a single file.
        save_model(model, str(work / PLAIN_NAME), metadata={"format": "pt"})
        return work / PLAIN_NAME
    folder = work / "checkpoint"
    if base is None:
        _save_folder(model, folder)
        check_reads_back(model, folder)
    else:
        _save_part(model, folder, base)
        _copy_side_files(folder, base)
    return folder


def _save_part(model: nn.Module, folder: Path, base: Path) -> None:
    """Save a model as its base is saved: with the same variant, names and configuration."""
    variant = weights_of(base, dtype_of(model)).variant
    _save_folder(model, folder, **({"variant": variant} if variant else {}))
    check_reads_back(model, folder, variant)
    _rename(folder, model, base)
    keep_config(folder, base)


def _save_folder(model: Any, folder: Path, **options: str) -> None:
    model.save_pretrained(folder, **options)


def _rename(folder: Path, model: nn.Module, base: Path) -> None:
    """Rename the tensors of a saved model to the names that the base uses."""
    renamed = names_in_base(model, list(tensor_names(folder)), base)
    if not renamed:
        return
    for path in weight_files(folder):
        tensors = {renamed.get(name, name): tensor for name, tensor in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "pt"})
    index_path = folder / f"{PLAIN_NAME}.index.json"
    if index_path.exists():
        index = json.loads(index_path.read_text("utf-8"))
        shards = index["weight_map"]
        index["weight_map"] = {renamed.get(name, name): shards[name] for name in shards}
        index_path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", "utf-8")


def _copy_side_files(folder: Path, base: Path) -> None:
    """Copy files of the base to the saved model, except weights and files that it already has."""
    for source in sorted(base.rglob("*")):
        place = folder / source.relative_to(base)
        is_weights = source.name.lower().endswith(WEIGHT_SUFFIXES)
        if source.is_file() and not is_weights and not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, place)


def _move(source: Path, final: Path) -> None:
    if final.is_dir() and not final.is_symlink():
        shutil.rmtree(final)
    elif os.path.lexists(final):
        final.unlink()
    shutil.move(source, final)

"""Writes what a run changed as a delta: base and trained checkpoint on disk, then their difference.

The trained checkpoint is a complete one, with the base's tokenizer and other files, so that what
``apply`` rebuilds can be used as it stands.
"""

from __future__ import annotations

import json
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
    names_in_base,
    tensor_names,
    weight_files,
)
from sift_train.sift import SIFT
from sift_train.targets import check_saves_weights

WEIGHT_SUFFIXES = (
    ".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".ckpt",
    ".h5", ".msgpack", ".onnx", ".gguf", ".ot", ".pb", ".tflite",
)  # fmt: skip

PLAIN_NAME = "model.safetensors"


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
    """Write the delta from the base to the model as it is now; return how many components it changes.

    A transformers model is saved as a folder, any other module as one safetensors file. Its tensors
    keep the names that ``base`` has for them, with or without the model's prefix.

    Args:
        model: trained.
        output: where the delta goes; its folder must exist.
        sift: what trained the model. Without ``base`` it lends the model its first weights, and
            the base is the model saved with those. With ``base`` it is made sure that this is what
            the model was before training; leave ``sift`` out for a delta between any two.
        base: the checkpoint that the training began with: a folder for a transformers model, a
            safetensors file for any other module.
        base_id: where others find the base, such as ``org/model@<commit>``.
        info: plain JSON, recorded in the delta. With ``sift``, ``mean_change`` is added: by tensor,
            the mean absolute change of the components that changed.
        save_target: keep the trained checkpoint here.
        overwrite: replace what is at ``output`` and ``save_target``.

    Raises:
        FileExistsError: something is at ``output`` or ``save_target`` and may not be replaced.
        ValueError: there is neither ``base`` nor ``sift``, or the base is of the wrong kind or is
            not what ``sift`` began with; or the model is wrapped, sharded, or has PEFT adapters.
    """
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    check_saves_weights(model)
    check_places(model, output, base=base, save_target=save_target, overwrite=overwrite)
    if base is None and sift is None:
        raise ValueError("nothing says what the base is; give base, or the sift that trained")
    if base is not None and sift is not None:
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
    """Do what ``export_delta`` does, where the base is known to be the right one.

    Raises:
        OSError: something cannot be written.
        ValueError: base and model cannot be compared.
    """
    final = Path(os.path.abspath(output))
    with ExitStack() as stack:
        if base is None and sift is not None:
            base_path = stack.enter_context(_work_folder(final, "base"))
            with sift.reverted(), _lent_config(model, sift.first_config):
                base_path = _save(model, base_path, None)
        else:
            base_path = Path(os.path.abspath(str(base)))
        work = stack.enter_context(_work_folder(final, "target"))
        target = _save(model, work, base_path if base is not None else None)
        delta = stack.enter_context(
            sparsedelta.diff(base_path, target, base_id=base_id, info=_with_changes(info, sift))
        )
        delta.save(final, overwrite=overwrite)
        nnz = delta.nnz
        if save_target is not None:
            _move(target, Path(os.path.abspath(save_target)))
    return nnz


def check_places(
    model: nn.Module,
    output: str | PathLike[str],
    *,
    base: str | PathLike[str] | None,
    save_target: str | PathLike[str] | None,
    overwrite: bool,
) -> None:
    """Find out before any work whether the export can be written.

    Raises:
        FileExistsError: something is in the way.
        FileNotFoundError: base, or a folder to write in, does not exist.
        ValueError: the base is of the wrong kind, or holds no safetensors.
    """
    for place in (output, save_target):
        if place is None:
            continue
        path = Path(os.path.abspath(place))
        if os.path.lexists(path) and not overwrite:
            raise FileExistsError(f"'{path}' exists; choose another name, or set overwrite")
        if not path.parent.is_dir():
            raise FileNotFoundError(f"folder '{path.parent}' does not exist; create it first")
    if base is None:
        return
    base_path = Path(base)
    if not base_path.exists():
        raise FileNotFoundError(f"base '{base_path}' does not exist")
    if _is_transformers(model) != base_path.is_dir():
        wanted = "folder" if _is_transformers(model) else "safetensors file"
        raise ValueError(
            f"base '{base_path}' is not a {wanted}, which is what a {type(model).__name__} "
            "is saved as; give one, or leave base out"
        )
    check_weights(base_path)


def _with_changes(info: Mapping[str, Any] | None, sift: SIFT | None) -> dict[str, Any]:
    """Return the info with how far the trained components have moved, which a delta cannot tell."""
    whole = dict(info or {})
    if sift is None:
        return whole
    moved = {name: part.mean_change for name, part in sift.sparse_mapping.items()}
    known = {name: float(f"{mean:.3g}") for name, mean in moved.items() if mean is not None}
    return {"mean_change": known, **whole} if known else whole


def _is_transformers(model: nn.Module) -> bool:
    return hasattr(model, "save_pretrained") and hasattr(model, "config")


@contextmanager
def _lent_config(model: nn.Module, config: Any) -> Iterator[None]:
    """Lend a model the config it came with; some write into theirs in their first forward pass."""
    if config is None:
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
        # Named as the base is: a single file's own name is no part of a checkpoint.
        save_model(model, str(work / PLAIN_NAME), metadata={"format": "pt"})
        return work / PLAIN_NAME
    folder = work / "checkpoint"
    save_pretrained: Any = model.save_pretrained
    save_pretrained(folder)
    if base is not None:
        _rename(folder, model, base)
        _complete(folder, base)
    return folder


def _rename(folder: Path, model: nn.Module, base: Path) -> None:
    """Give the tensors of a saved model the names that they have in the base."""
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


def _complete(folder: Path, base: Path) -> None:
    """Copy what the base has beside its weights and the saved model lacks."""
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

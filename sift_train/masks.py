"""Masks: which components of a model are trained, in files, from deltas, united and intersected.

A mask is a mapping of parameter names to bool tensors of the parameters' shapes. Its file has the form that
``sparsedelta convert --to mask`` writes: a safetensors file of bool tensors. ``.npz`` files and files of ``torch.save`` are read, too; no pickle is executed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import sparsedelta
from sift_train.bits import bits_of

if TYPE_CHECKING:
    from sift_train.sift import SIFT

FORMAT = {"format": "mask"}
DELTA_SUFFIX = ".sd"
PICKLED_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")  # written by torch.save
SUFFIXES = (".safetensors", ".npz", *PICKLED_SUFFIXES, DELTA_SUFFIX)

Mask = Mapping[str, Any]


def is_mask(selection: Any) -> bool:
    """Return whether a selection is a mapping, a delta, or a path of a mask or a delta, and not a rule."""
    if isinstance(selection, str):
        return selection.endswith(SUFFIXES)
    return isinstance(selection, Mapping | PathLike | sparsedelta.Delta)


def save_mask(sift: SIFT, path: str | PathLike[str], *, overwrite: bool = False) -> None:
    """Write which components a SIFT trains, sparsely or densely, as a mask.

    Raises:
        FileExistsError: the file exists and ``overwrite`` is not set.
        ValueError: the components of a parameter are not chosen yet, or the model is sharded.
    """
    if os.path.lexists(path) and not overwrite:
        raise FileExistsError(
            f"mask '{path}' exists; choose another name, or overwrite it (overwrite=True)"
        )
    masks = {}
    for name, part in sift.sparse_mapping.items():
        if part.shard is not None:
            raise ValueError(
                f"parameter {name!r} is sharded, and each rank holds a part of the choice; use save_sharded"
            )
        mask = torch.zeros(part.parameter.numel(), dtype=torch.bool)
        mask[part.flat_index.long().cpu()] = True
        masks[name] = mask.view(part.parameter.shape)
    save_file(masks, path, metadata=FORMAT)


def load_mask(path: str | PathLike[str]) -> dict[str, Tensor]:
    """Return the mask in a ``.safetensors`` or ``.npz`` file, or in one that ``torch.save`` wrote (``.pt``).

    The tensors are on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file has another form, or holds tensors that are not bool.
    """
    found: dict[str, Tensor]
    try:
        if os.fspath(path).endswith(".npz"):
            with np.load(path, allow_pickle=False) as file:
                found = {name: torch.from_numpy(file[name]) for name in file.files}
        elif os.fspath(path).endswith(PICKLED_SUFFIXES):
            masks = sparsedelta.read_mask(path)
            found = {name: torch.from_numpy(mask) for name, mask in masks.items()}
        else:
            found = load_file(path)
    except (SafetensorError, EOFError, ValueError) as error:
        raise ValueError(
            f"'{path}' is not a mask: {error}; give a .safetensors, .npz or .pt file"
        ) from error
    for name, mask in found.items():
        if mask.dtype != torch.bool:
            raise ValueError(
                f"{name!r} in '{path}' has dtype {mask.dtype}, and a mask is of bool; for the positions that"
                " a delta changes, give the .sd file"
            )
    return found


def mask_of_delta(
    delta: str | PathLike[str] | sparsedelta.Delta, model: nn.Module
) -> dict[str, Tensor]:
    """Return which components of a model a delta changes.

    The delta is applied to the model and taken back, which needs memory for a second copy of the model on the CPU.

    Args:
        delta: a delta, or the path of one.
        model: it must hold the weights of the delta's base.

    Raises:
        MismatchError: the model does not hold the delta's base.
    """
    if not isinstance(delta, sparsedelta.Delta):
        with sparsedelta.load(delta) as opened:
            return mask_of_delta(opened, model)
    before = {name: p.detach().to("cpu", copy=True) for name, p in model.named_parameters()}
    masks = {}
    try:
        with delta.applied(model):
            for name, parameter in model.named_parameters():
                mask = bits_of(parameter.detach().cpu()) != bits_of(before.pop(name))
                if mask.any():
                    masks[name] = mask
    except sparsedelta.SparseDeltaError as error:
        raise type(error)(
            f"the model does not hold the base of the delta whose components are to be trained: {error}; for another model of"
            " these shapes, make a mask of the delta first (sparsedelta convert delta.sd mask.safetensors --base BASE --to mask)",
            tensor=error.tensor,
        ) from error
    return masks


def find_masks(selection: Any, model: nn.Module) -> Mapping[str, Any]:
    """Return the mask of a selection that is one, by the model's names; nothing for a rule.

    Raises:
        ValueError: the mask is empty, or names a parameter that the model does not have.
    """
    if not is_mask(selection):
        return {}
    if isinstance(selection, Mapping):
        masks = dict(selection)
    elif isinstance(selection, sparsedelta.Delta) or Path(selection).suffix == DELTA_SUFFIX:
        masks = mask_of_delta(selection, model)
    else:
        found = load_mask(selection)
        masks = {name: mask for name, mask in found.items() if mask.any()}
    if not masks:
        raise ValueError("the mask given as selection chooses no component")
    known = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return {_own_name(name, known, model): mask for name, mask in masks.items()}


def _own_name(name: str, known: set[str], model: nn.Module) -> str:
    """Return the model's name of a parameter, which may have a prefix that the mask does not have, or the reverse."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    for own in (name, prefix + name, name.removeprefix(prefix)):
        if own in known:
            return own
    raise ValueError(
        f"the mask given as selection names {name!r}, which is no parameter of {type(model).__name__}"
    )


def unite(*masks: Mask) -> dict[str, Tensor]:
    """Return the components that any of several masks chooses.

    Raises:
        ValueError: two masks of a parameter have different shapes, or a mask is not of bool.
    """
    names = dict.fromkeys(name for mask in masks for name in mask)
    return {name: _combined(torch.logical_or, name, masks) for name in names}


def intersect(*masks: Mask) -> dict[str, Tensor]:
    """Return the components that all of several masks choose; parameters without one are left out.

    Raises:
        ValueError: as ``unite``.
    """
    names = [name for name in (masks[0] if masks else {}) if all(name in mask for mask in masks)]
    found = {name: _combined(torch.logical_and, name, masks) for name in names}
    return {name: mask for name, mask in found.items() if mask.any()}


def _combined(
    combine: Callable[[Tensor, Tensor], Tensor], name: str, masks: tuple[Mask, ...]
) -> Tensor:
    own = [torch.as_tensor(mask[name]).cpu() for mask in masks if name in mask]
    for each in own:
        if each.dtype != torch.bool or each.shape != own[0].shape:
            raise ValueError(
                f"the masks of {name!r} have {each.dtype} and shape {tuple(each.shape)}, expected"
                f" torch.bool and {tuple(own[0].shape)}"
            )
    result = own[0].clone()
    for each in own[1:]:
        result = combine(result, each)
    return result

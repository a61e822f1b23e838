"""Saves and restores the training of a sharded model with torch.distributed.checkpoint.

A checkpoint has, for each parameter, the flat indices in the whole tensor, originals, masters and optimizer
state as vectors. So it can be restored with any number of ranks, or in one process.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from sift_train.buffers import set_buffers
from sift_train.masters import SparseParameter
from sift_train.ranks.pieces import Piece
from sift_train.saved import BUFFER, INDEX, LR_SHARE, MASTER, ORIGINAL

if TYPE_CHECKING:
    from sift_train.sift import SIFT

STATE, SHAPE = "state:", "shape:"


def save_sharded(
    sift: SIFT, folder: str | PathLike[str], optimizer: Optimizer | None = None
) -> None:
    """Write the state of a training as a folder of torch.distributed.checkpoint; all ranks must call it.

    The folder does not hold the model, which is loaded from the base, nor settings of the optimizer.

    Args:
        sift: the SIFT; all components must be chosen, and no parameter's choice may be open.
        folder: the folder to write; an existing one is replaced after all ranks have written. All ranks
            must see the same folder.
        optimizer: its state for each component is saved, too.

    Raises:
        ValueError: components are not chosen yet, or the optimizer's state is not one number for each
            component or for all, so that it cannot be divided among other ranks.
    """
    from torch.distributed.checkpoint.state_dict_saver import save

    final = Path(os.path.abspath(folder))
    work = final.with_name(f".{final.name}.partial")
    sift.check_ranks()
    sift.ranks.first_does(lambda: shutil.rmtree(work, ignore_errors=True))
    is_alone = sift.ranks.size == 1
    with _quiet():
        save(dict(_state(sift, optimizer)), checkpoint_id=work, no_dist=is_alone)
    sift.ranks.first_does(lambda: _replace(work, final))


def load_sharded(
    sift: SIFT, folder: str | PathLike[str], optimizer: Optimizer | None = None
) -> None:
    """Restore what ``save_sharded`` wrote, with any number of ranks; all ranks must call it.

    Each rank reads the vectors of one parameter at a time and keeps those of its shard.

    Args:
        sift: a SIFT of the same parameters; the model must hold the base's weights or the trained weights.
        folder: the folder that ``save_sharded`` wrote.
        optimizer: an optimizer of all masters, whose state is replaced.

    Raises:
        ValueError: the state is of other parameters or of another optimizer, or the model holds other
            weights.
    """
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load

    held = FileSystemReader(folder).read_metadata().state_dict_metadata
    names = {key.removeprefix(MASTER) for key in held if key.startswith(MASTER)}
    different = sorted(names ^ set(sift.sparse_mapping))
    if different:
        raise ValueError(
            f"{different[0]!r} is trained either here or in '{folder}', but not in both; use the"
            " sparse_module and exception that the state was saved with"
        )

    def read(keys: list[str]) -> dict[str, Tensor]:
        found: Any = {key: _empty(held[key]) for key in keys}
        with _quiet():
            load(found, storage_reader=FileSystemReader(folder), no_dist=True)
        return dict(found)

    sift.reshard()
    for name, part in sift.sparse_mapping.items():
        prefix = f"{STATE}{name}:"
        states = [key for key in held if key.startswith(prefix)] if optimizer is not None else []
        keys = [
            key
            for key in (INDEX + name, SHAPE + name, ORIGINAL + name, MASTER + name)
            if key in held
        ]
        found = read([*keys, *states])
        _check_shape(part, found[SHAPE + name])
        is_own, index = _own(part, found.get(INDEX + name))
        part.restore(index, found[ORIGINAL + name][is_own], found[MASTER + name][is_own])
        part.n_wanted = len(found[MASTER + name])
        if optimizer is not None:
            saved = {key.removeprefix(prefix): found[key] for key in states}
            optimizer.state[part.master] = _own_state(part, saved, is_own)
    sift.lr_share = float(read([LR_SHARE])[LR_SHARE]) if LR_SHARE in held else None
    buffers = read([key for key in held if key.startswith(BUFFER)])
    set_buffers(sift.model, {key.removeprefix(BUFFER): value for key, value in buffers.items()})


def _state(sift: SIFT, optimizer: Optimizer | None) -> Iterator[tuple[str, Tensor]]:
    for name, part in sift.sparse_mapping.items():
        if part.original is None:
            raise ValueError(
                f"the components of {name!r} are not chosen yet; save after its first step, or leave it out"
            )
        if not (part.trains_all and part.shard is None):
            index = part.flat_index.cpu()
            whole = index if part.shard is None else part.shard.to_whole(index)
            yield INDEX + name, Piece.of(whole.long(), part.shard)
        shape = part.parameter.shape
        yield SHAPE + name, torch.tensor([len(shape), *shape])
        yield ORIGINAL + name, Piece.of(part.original.cpu(), part.shard)
        yield MASTER + name, Piece.of(part.master.detach().cpu(), part.shard)
        for key, value in _state_of_master(optimizer, part):
            yield f"{STATE}{name}:{key}", value
    for name, buffer in sift.model.named_buffers():
        yield BUFFER + name, buffer.detach().cpu()
    if sift.lr_share is not None:
        yield LR_SHARE, torch.tensor(sift.lr_share, dtype=torch.float64)


def _state_of_master(
    optimizer: Optimizer | None, part: SparseParameter
) -> Iterator[tuple[str, Tensor]]:
    state = {} if optimizer is None else optimizer.state.get(part.master, {})
    for key, value in state.items():
        if value is None:
            continue
        tensor = torch.as_tensor(value).detach().cpu()
        if not tensor.dim():
            yield key, tensor
        elif tensor.shape == part.master.shape:
            yield key, Piece.of(tensor, part.shard)
        else:
            raise ValueError(
                f"the optimizer's {key!r} of {part.name!r} has shape {tuple(tensor.shape)}, expected"
                f" {tuple(part.master.shape)}, one number for each component; use an optimizer such as AdamW"
            )


def _own(part: SparseParameter, index: Tensor | None) -> tuple[Any, Tensor | None]:
    """Return which components of a saved vector are in this rank's shard, in order, and their indices."""
    if index is None and part.shard is None:
        return slice(None), None
    if index is None:
        index = torch.arange(part.shard.numel if part.shard is not None else 0)
    if part.shard is None:
        order = index.argsort()
        return order, index[order]
    is_inside, inner = part.shard.to_part(index)
    order = inner.argsort()
    return is_inside.nonzero().flatten()[order], inner[order]


def _own_state(
    part: SparseParameter, saved: Mapping[str, Tensor], is_own: Any
) -> dict[str, Tensor]:
    device = part.master.device
    # A number for all components, such as the count of steps, is on the CPU as torch's optimizers keep it.
    return {key: v[is_own].to(device) if v.dim() else v for key, v in saved.items()}


def _check_shape(part: SparseParameter, saved: Tensor) -> None:
    shape = part.parameter.shape
    if saved.tolist() != [len(shape), *shape]:
        raise ValueError(
            f"the saved {part.name!r} has shape {tuple(saved.tolist()[1:])}, expected {tuple(shape)}"
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide torch's notice that a rank reads or writes alone."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield


def _empty(metadata: Any) -> Tensor:
    return torch.empty(metadata.size, dtype=metadata.properties.dtype)


def _replace(work: Path, final: Path) -> None:
    if final.exists():
        shutil.rmtree(final)
    work.rename(final)

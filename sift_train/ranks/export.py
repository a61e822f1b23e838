"""Writes the delta of a sharded model without gathering the model.

Only trained components cross the network, one tensor at a time. Rank 0 writes them into a copy of the
base's files and compares this copy with the base. All ranks compare their shards with the base.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn

from sift_train.basecheck import names_in_base, tensor_places
from sift_train.bits import bits_of
from sift_train.masters import SparseParameter
from sift_train.ranks.shard import Shard, local_part, shard_of
from sift_train.weightfiles import dtype_of

if TYPE_CHECKING:
    from sift_train.sift import SIFT


def check_shards(sift: SIFT, base: Path) -> dict[str, Path]:
    """Check that a base holds the model's weights from before training; return the trained tensors' files.

    Each rank compares its shards, one tensor at a time. All ranks must call this.

    Raises:
        ValueError: a tensor of the model is not in the base under its name, with its shape and dtype, or
            has other values there.
    """
    places = tensor_places(base, dtype_of(sift.model))
    renamed = names_in_base(sift.model, [n for n, _ in sift.model.named_parameters()], base)
    parts = {id(part.parameter): part for part in sift.sparse_mapping.values()}
    problem = None
    for name, parameter in sift.model.named_parameters():
        own = renamed.get(name, name)
        problem = problem or _problem(own, parameter, parts.get(id(parameter)), places.get(own))
    found = sift.ranks.sum_(torch.tensor(float(problem is not None)))
    if problem is not None:
        raise ValueError(
            f"base '{base}': {problem}; give the checkpoint that the model was loaded from"
        )
    if found:
        raise ValueError(
            f"base '{base}' differs from the model before training in the shard of another rank"
        )
    return {name: places[renamed.get(name, name)] for name in sift.sparse_mapping}


def write_components(sift: SIFT, base: Path, target: Path) -> None:
    """Write all trained components into a copy of the base; all ranks must call this, rank 0 writes.

    Args:
        sift: the SIFT of the sharded model.
        base: the folder or file that ``check_shards`` has accepted.
        target: the copy of it that is edited; only rank 0 reads and writes it.

    Raises:
        RuntimeError: rank 0 could not write.
    """
    renamed = names_in_base(sift.model, list(sift.sparse_mapping), base)
    places = tensor_places(base, dtype_of(sift.model))
    for name, part in sift.sparse_mapping.items():
        own = renamed.get(name, name)
        entries = list(_gathered(sift, part))
        path = target if base.is_file() else target / places[own].relative_to(base)
        sift.ranks.first_does(lambda p=path, n=own, e=entries: _write(p, n, e))  # type: ignore[misc]


def copy_base(base: Path, work: Path) -> Path:
    """Copy a base to a work folder; return the copy's path."""
    if base.is_file():
        return Path(shutil.copyfile(base, work / base.name))
    return Path(shutil.copytree(base, work / "checkpoint"))


def _problem(
    name: str, parameter: nn.Parameter, part: SparseParameter | None, path: Path | None
) -> str | None:
    if path is None:
        return f"has no tensor {name!r}, which the model has"
    with safe_open(path, framework="pt") as file:
        held: Any = file.get_slice(name)
        if tuple(held.get_shape()) != tuple(parameter.shape):
            return f"{name!r} has shape {held.get_shape()}, the model's has {list(parameter.shape)}"
        shard = shard_of(parameter)
        found = file.get_tensor(name) if shard is None else held[shard.spans]
    before = local_part(parameter).cpu()
    if found.dtype != before.dtype:
        return f"{name!r} has dtype {found.dtype}, the model's has {before.dtype}"
    if part is not None and part.original is not None:
        flat = before.reshape(-1).clone()
        flat[part.flat_index.cpu().long()] = part.original.cpu()
        before = flat.view(before.shape)
    if not torch.equal(bits_of(found), bits_of(before)):
        return f"{name!r} has other values than the model before training"
    return None


def _gathered(sift: SIFT, part: SparseParameter) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield, on rank 0, the flat indices in the whole tensor and the bits of each rank's components."""
    index, values = _entries(part, part.shard)
    if sift.ranks.is_first:
        yield index, values
    if part.shard is None or sift.ranks.size == 1:
        return
    sizes = torch.zeros(sift.ranks.size, dtype=torch.int64)
    sizes[sift.ranks.rank] = len(index) if part.shard.is_first_copy else 0
    sift.ranks.sum_(sizes)
    for rank in range(1, sift.ranks.size):
        n = int(sizes[rank])
        if not n:
            continue
        if sift.ranks.is_first:
            index, values = torch.empty(n, dtype=torch.int64), torch.empty(n, dtype=values.dtype)
        if sift.ranks.rank in (0, rank):
            for tensor in (index, values):
                sift.ranks.send(tensor, source=rank)
        if sift.ranks.is_first:
            yield index, values


def _entries(part: SparseParameter, shard: Shard | None) -> tuple[Tensor, Tensor]:
    index = part.flat_index.cpu().long()
    values = bits_of(part.local.reshape(-1).cpu())[index]
    return (index if shard is None else shard.to_whole(index)), values


def _write(path: Path, name: str, entries: list[tuple[Tensor, Tensor]]) -> None:
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header: Mapping[str, Any] = json.loads(file.read(length))
    start, end = header[name]["data_offsets"]
    if start == end:
        return
    width = entries[0][1].element_size()
    flat = np.memmap(path, f"<i{width}", "r+", 8 + length + start, ((end - start) // width,))
    for index, values in entries:
        flat[index.numpy()] = values.numpy()
    flat.flush()

"""What the export of a sharded model checks and states; all ranks call these functions, and no rank gathers a tensor."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from sift_train.basecheck import names_in_base, tensor_places
from sift_train.bits import bits_of, mean_of, sums_of_changes
from sift_train.masters import SparseParameter
from sift_train.ranks.shard import local_part, shard_of
from sift_train.targets import names_of_parameters
from sift_train.weightfiles import dtype_of

if TYPE_CHECKING:
    from sift_train.sift import SIFT

_SLICE = 1 << 18  # components that are compared at a time, or one row of the shard


def check_shards(sift: SIFT, base: Path) -> dict[tuple[Path, str], Tensor]:
    """Check that a base holds the model's weights from before training; return the parameters by their file and name there.

    Each rank compares its shards, some rows at a time. A tied parameter is compared under its first name and returned
    under all that the base has.

    Raises:
        ValueError: a parameter is not in the base under its name, with its shape and dtype, or has
            other values there.
    """
    places = tensor_places(base, dtype_of(sift.model))
    names = names_of_parameters(sift.model)
    renamed = names_in_base(sift.model, [name for own in names.values() for name in own], base)
    parts = {id(part.parameter): part for part in sift.sparse_mapping.values()}
    problem = None
    found: dict[tuple[Path, str], Tensor] = {}
    for parameter, own in names.items():
        in_base = [renamed.get(name, name) for name in own]
        path = places.get(in_base[0])
        problem = problem or _problem(in_base[0], parameter, parts.get(id(parameter)), path)
        found |= {(places[name], name): parameter for name in in_base if name in places}
    n_problems = sift.ranks.sum_(torch.tensor(float(problem is not None)))
    if problem is not None:
        raise ValueError(
            f"base '{base}': {problem}; give the checkpoint that the model was loaded from"
        )
    if n_problems:
        raise ValueError(
            f"base '{base}' differs from the model before training in the shard of another rank"
        )
    return found


def mean_changes_of_shards(sift: SIFT, base: Path) -> dict[str, float]:
    """Return the mean |change| of the changed components of each parameter over all shards, by its name in the base."""
    renamed = names_in_base(sift.model, list(sift.sparse_mapping), base)
    found = {}
    for name, part in sift.sparse_mapping.items():
        sums = sums_of_changes(part.changes(_SLICE))
        if part.shard is not None:
            part.shard.sum_(sums)
        mean = mean_of(sums)
        if mean is not None:
            found[renamed.get(name, name)] = mean
    return found


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
        own = local_part(parameter)
        first_values = part.first_values() if part else None
        for spans, start, end in _spans(
            own.shape, (0,) * own.dim() if shard is None else shard.offset
        ):
            found = held[spans].reshape(-1)
            before = first_values(start, end) if first_values else own.reshape(-1)[start:end].cpu()
            if found.dtype != before.dtype:
                return f"{name!r} has dtype {found.dtype}, the model's has {before.dtype}"
            if not torch.equal(bits_of(found), bits_of(before)):
                return f"{name!r} has other values than the model before training"
    return None


def _spans(shape: Sequence[int], offset: Sequence[int]) -> Iterator[tuple[Any, int, int]]:
    """Yield some rows of a shard at a time: their slices of the whole tensor, and the first and last flat index in the shard."""
    if not shape:
        yield ..., 0, 1
        return
    n_inner = math.prod(shape[1:])
    n_rows = max(1, _SLICE // max(n_inner, 1))
    inner = [slice(at, at + size) for at, size in zip(offset[1:], shape[1:], strict=True)]
    for row in range(0, shape[0], n_rows):
        end = min(row + n_rows, shape[0])
        yield (slice(offset[0] + row, offset[0] + end), *inner), row * n_inner, end * n_inner

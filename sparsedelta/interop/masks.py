"""Masks in files of ``torch.save``: bool tensors by name. The pickle is read as data, and never executed."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, Any

import numpy as np

from sparsedelta._typing import AnyPath
from sparsedelta.errors import CheckpointError, LimitExceeded
from sparsedelta.fs import open_regular
from sparsedelta.interop.archive import Stored, open_archive
from sparsedelta.interop.inert_pickle import Global, Made, Persistent

if TYPE_CHECKING:
    import numpy.typing as npt

    Flags = npt.NDArray[np.bool_]

_MOST_SHARED = 16


def read_mask(path: AnyPath) -> dict[str, Flags]:
    """Return the masks in a file that ``torch.save`` wrote: a mapping of names to bool tensors.

    No code of the file is executed. The memory needed is bounded by the size of the file.

    Args:
        path: the file.

    Returns:
        By name, each in the tensor's shape. Masks that share data in the file share it here.

    Raises:
        CheckpointError: the file was not written by ``torch.save``, is damaged, or holds something else.
        LimitExceeded: the masks share data so often that they have far more elements than the file has bytes.
    """
    fd = open_regular(path)
    try:
        with open_archive(fd, path) as stored:
            root = stored.root()
            pairs = root.pairs or [] if _is_dict(root) else None
            if pairs is None:
                raise CheckpointError(f"'{path}' does not hold a mapping of names to bool tensors")
            return _masks(pairs, stored, _MOST_SHARED * os.fstat(fd).st_size)
    finally:
        os.close(fd)


def _masks(pairs: list[tuple[Any, Any]], stored: Stored, limit: int) -> dict[str, Flags]:
    storages: dict[str, Flags] = {}
    found: dict[str, Flags] = {}
    for key, value in pairs:
        name = _name(key, stored.path)
        mask = found[name] = _mask(name, value, stored, storages)
        limit -= mask.size
        if limit < 0:
            raise LimitExceeded(
                f"the masks in '{stored.path}' have more than {_MOST_SHARED} times as many elements as the file has"
                " bytes; save them without sharing data"
            )
    return found


def _is_dict(node: Any) -> bool:
    """Return whether a value of a pickle is a dict, an OrderedDict, or the like."""
    return isinstance(node, Made) and node.values is None and node.args in ((), None)


def _name(key: Any, path: AnyPath) -> str:
    if not isinstance(key, str):
        raise CheckpointError(
            f"'{path}' has a key that is no text, expected the names of parameters"
        )
    return key


def _mask(name: str, node: Any, stored: Stored, storages: dict[str, Flags]) -> Flags:
    """Return one mask as a view; ``storages`` holds those that were read."""
    found = _view(node)
    if found is None:
        raise CheckpointError(
            f"{name[:80]!r} in '{stored.path}' is not a bool tensor on the CPU or a GPU, which a mask consists of"
        )
    key, offset, shape, strides = found
    if key not in storages:
        storages[key] = np.frombuffer(stored.data(key), np.uint8) != 0
    storage = storages[key]
    last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    n_elements = math.prod(shape)
    if n_elements == 0:
        return np.zeros(shape, np.bool_)
    if n_elements > len(storage) or last >= len(storage):
        raise CheckpointError(
            f"{name[:80]!r} in '{stored.path}' has {n_elements} elements, but its data has {len(storage)}; save"
            " contiguous tensors"
        )
    return np.lib.stride_tricks.as_strided(storage[offset:], shape, strides)


def _view(node: Any) -> tuple[str, int, tuple[int, ...], tuple[int, ...]] | None:
    """Return storage, offset, shape and strides of a bool tensor; None if it is something else."""
    if not (isinstance(node, Made) and isinstance(node.call, Global)):
        return None
    if node.call.name == "torch._utils._rebuild_parameter" and isinstance(node.args, tuple):
        return _view(node.args[0]) if node.args else None
    if not node.call.name.startswith("torch._utils._rebuild_tensor"):
        return None
    match node.args:
        case (
            Persistent(key=("storage", Global(name="torch.BoolStorage"), str(key), _, int(_))),
            int(offset),
            tuple(shape),
            tuple(strides),
            *_,
        ) if offset >= 0 and len(shape) == len(strides) and _are_sizes(shape + strides):
            return key, offset, shape, strides
    return None


def _are_sizes(numbers: tuple[Any, ...]) -> bool:
    return len(numbers) <= 64 and all(isinstance(n, int) and 0 <= n < 1 << 48 for n in numbers)

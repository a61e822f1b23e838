"""Weight files that the target takes whole from the base. Some file systems copy them without writing: both share the data."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from sparsedelta.files.checkpoint import Tensor
from sparsedelta.files.layout import FileLayout
from sparsedelta.format.columns import columns_of
from sparsedelta.format.delta import Delta
from sparsedelta.format.records import TensorKey
from sparsedelta.ops.base_check import PlacedTensors
from sparsedelta.system import read_at
from sparsedelta.tensors.small import Places

Base = Mapping[TensorKey, Tensor]


def same_files(base: Base, delta: Delta, layouts: Sequence[FileLayout]) -> list[int | None]:
    """Return for each weight file of the target the descriptor of the base's file that has the same bytes, or None.

    That the tensors have the right bytes is not checked.
    """
    found, start = [], 0
    for layout in layouts:
        end = start + len(layout.offsets)
        fd = _fd_of_copy(base, delta, start, end, layout)
        found.append(fd if fd is not None and _has_layout(fd, layout) else None)
        start = end
    return found


def _fd_of_copy(base: Base, delta: Delta, start: int, end: int, layout: FileLayout) -> int | None:
    """Return the descriptor of the file that has the base tensors of all rows, unchanged, at their places in the target."""
    columns = columns_of(delta.tensors)
    if start == end:
        return None
    if columns and isinstance(base, PlacedTensors):
        if not columns.is_copied[start:end].all():
            return None
        fds, at = base.places.fd[start:end], base.places.at[start:end]
    else:
        rows = delta.tensors[start:end]
        if not all(row.is_copied for row in rows):
            return None
        tensors = [base[row.key] for row in rows]
        fds = np.array([tensor.fd for tensor in tensors], np.int64)
        at = np.array([tensor.offset for tensor in tensors], np.int64)
    is_one = fds[0] >= 0 and bool((fds == fds[0]).all())
    return int(fds[0]) if is_one and bool((at == layout.offsets).all()) else None


def _has_layout(fd: int, layout: FileLayout) -> bool:
    head = len(layout.header).to_bytes(8, "little") + layout.header
    return os.fstat(fd).st_size == layout.n_bytes and read_at(fd, len(head), 0) == head


def read_from(
    base: Base, delta: Delta, layouts: Sequence[FileLayout], clones: Sequence[int | None]
) -> Base:
    """Return the base tensors, those of cloned files in their clones.

    What is checked is then what the target holds, even if the base changes meanwhile.

    Args:
        base: the base tensors.
        delta: the delta.
        layouts: the layout of each weight file of the target.
        clones: a descriptor for reading each file that was cloned; None for the others.
    """
    if not any(clone is not None for clone in clones):
        return base
    sizes = [len(layout.offsets) for layout in layouts]
    fds = np.repeat([-1 if clone is None else clone for clone in clones], sizes)
    if isinstance(base, PlacedTensors):
        places = Places(np.where(fds < 0, base.places.fd, fds), base.places.at)
        return base.moved(places)
    moved = dict(base)
    for row, fd in zip(delta.tensors, fds.tolist(), strict=True):
        if fd >= 0:
            moved[row.key] = replace(moved[row.key], fd=fd)
    return moved

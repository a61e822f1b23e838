"""The target of a delta as a checkpoint that is rebuilt, and checked, while it is read."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sparsedelta.files.checkpoint import Checkpoint, Tensor, WeightFile
from sparsedelta.files.layout import target_layout
from sparsedelta.files.shards import roles
from sparsedelta.files.side_files import write_side_file
from sparsedelta.format.delta import Delta
from sparsedelta.format.records import TensorKey
from sparsedelta.format.safetensors_header import parse_header
from sparsedelta.interop.view import PatchedTensor
from sparsedelta.ops.base_check import explained, find_base
from sparsedelta.tensors.parallel import Pace, n_workers
from sparsedelta.tensors.rebuild import rebuild


class RebuiltCheckpoint(Checkpoint):
    """The target of a delta. It uses the open files of the base and the delta, which must stay open.

    A tensor that equals its base tensor is that base tensor. Each other tensor is rebuilt as a whole when it is
    read, and its digest is compared.
    """

    def __init__(self, base: Checkpoint, delta: Delta, folder: Path) -> None:
        """Prepare the target.

        Args:
            base: the base of the delta.
            delta: the delta.
            folder: an empty folder for the side files that the delta carries.

        Raises:
            MismatchError: ``base`` is not the base of the delta.
            FormatError: the delta is damaged.
        """
        self.path = base.path
        self.is_folder = delta.target.is_folder
        self._fds = []
        self.left_out = ()
        self.empty_folders = delta.target.empty_folders
        self._delta, self._base = delta, base
        with explained(delta, base):
            self._found = find_base(delta, base)
        self._rows = {row.key: row for row in delta.tensors}
        self._load = lru_cache(n_workers())(self._rebuilt)
        self.tensors = {key: self._tensor(key) for key in self._rows}
        self.weight_files = self._weight_files()
        self.roles = roles([file.path for file in self.weight_files], {})
        self.side_files = {}
        for file in delta.target.side_files:
            if file.stored is None and file.path in base.side_files:
                self.side_files[file.path] = base.side_files[file.path]
            else:
                self.side_files[file.path] = folder / f"side-{len(self.side_files)}"
                write_side_file(delta, base, file, self.side_files[file.path])

    def _tensor(self, key: TensorKey) -> Tensor:
        row = self._rows[key]
        found = self._found.get(key)
        if row.is_copied and found is not None and found.spec.same_layout(row.target):
            return replace(found, file=row.file, name=row.name) if found.key != key else found
        return PatchedTensor(row.file, row.name, row.target.with_digest(None), -1, 0, self._load)

    def _rebuilt(self, key: TensorKey) -> npt.NDArray[np.uint8]:
        row = self._rows[key]
        data = np.empty(row.target.n_bytes, np.uint8)

        def write(block: memoryview, offset: int) -> None:
            data.data[offset : offset + len(block)] = block

        with explained(self._delta, self._base):
            rebuild(
                row, self._found.get(key), self._delta.payload, write, check="full", pace=Pace()
            )
        return data

    def _weight_files(self) -> tuple[WeightFile, ...]:
        tensors: dict[str, list[Tensor]] = defaultdict(list)
        for tensor in self.tensors.values():
            tensors[tensor.file].append(tensor)
        return tuple(
            WeightFile(
                layout.path,
                layout.header,
                parse_header(layout.header, layout.path),
                tuple(tensors[layout.path]),
            )
            for layout in target_layout(self._delta)
        )

    def close(self) -> None:
        """Release the tensors; base and delta stay open."""
        self._load.cache_clear()

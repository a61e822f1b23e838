"""Tensors in memory, each under any name, as a checkpoint of one file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from sparsedelta.files.checkpoint import Checkpoint, Tensor
from sparsedelta.files.shards import roles
from sparsedelta.live.bits import TensorBytes
from sparsedelta.live.saved import spec_of
from sparsedelta.live.sides import FILE_NAME, laid_out, weight_file

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class ItemTensor(Tensor):
    """A tensor in memory; ``held`` has its bytes."""

    held: TensorBytes

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` with the tensor's bytes from ``offset``; both must be multiples of the element size."""
        self.held.read_into(buffer, offset)


class Items(Checkpoint):
    """Tensors in memory as one weight file. Unlike a model, tensors that share memory are all kept."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Describe the tensors; they must be dense, of dtypes that safetensors has."""
        self.path = Path("tensors in memory")
        self.is_folder = False
        self._fds = []
        specs = laid_out({name: spec_of(tensor) for name, tensor in tensors.items()})
        file = weight_file(FILE_NAME, None, specs)
        held = tuple(
            ItemTensor(one.file, one.name, one.spec, -1, 0, TensorBytes(tensors[one.name]))
            for one in file.tensors
        )
        self.weight_files = (replace(file, tensors=held),)
        self.tensors = {tensor.key: tensor for tensor in held}
        self.roles = roles([FILE_NAME], {})
        self.side_files = {}
        self.empty_folders = self.left_out = ()

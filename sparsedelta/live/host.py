"""A checkpoint on disk as a state dict in host memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparsedelta._typing import AnyPath
from sparsedelta.errors import StructureMismatch
from sparsedelta.files.checkpoint import Checkpoint, Tensor
from sparsedelta.live.bits import check_installed, torch_dtype
from sparsedelta.tensors.parallel import Pace, run_all

if TYPE_CHECKING:
    import torch


def host_state(path: AnyPath) -> dict[str, torch.Tensor]:
    """Return the tensors of a checkpoint by name, in new memory of the host.

    Raises:
        CheckpointError: the path cannot be read as a checkpoint.
        StructureMismatch: two files have a tensor of the same name, or torch has no such dtype.
    """
    check_installed("torch")
    with Checkpoint(path, include=(), whole=False) as checkpoint:
        tensors = [*checkpoint.tensors.values()]
        files: dict[str, str] = {}
        for tensor in tensors:
            other = files.setdefault(tensor.name, tensor.file)
            if other != tensor.file:
                raise StructureMismatch(
                    f"tensor {tensor.name!r} is in '{other}' and in '{tensor.file}' of '{path}', expected in one"
                    " file; remove one of the two",
                    tensor=tensor.name,
                )
        loaded = run_all(_loaded, tensors, cost=lambda tensor: tensor.spec.n_bytes, pace=Pace())
        return {tensor.name: one for tensor, one in zip(tensors, loaded, strict=True)}


def _loaded(tensor: Tensor) -> torch.Tensor:
    import torch

    dtype = torch_dtype(tensor.spec.dtype)
    if dtype is None:
        raise StructureMismatch(
            f"tensor {tensor.name!r} is {tensor.spec.dtype.name}, which torch does not have",
            tensor=tensor.name,
        )
    data = torch.empty(tensor.spec.n_bytes, dtype=torch.uint8)
    if len(data):
        tensor.read_into(data.numpy().data, 0)
    return data.view(dtype).view(tensor.spec.shape)

"""Helpers: small models in memory and on disk, and comparisons of their bits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

import sparsedelta
from sparsedelta import Delta

VIEWS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
State = dict[str, torch.Tensor]


class Net(nn.Module):
    """Two layers, a norm and a buffer."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(10, 8)
        self.first = nn.Linear(8, 6)
        self.last = nn.Linear(6, 10, bias=False)
        self.register_buffer("scale", torch.ones(3))
        self.to(torch.bfloat16)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().contiguous().view(VIEWS[tensor.element_size()])


def same(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> bool:
    """Return whether two states have the same tensors, bit for bit."""
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype
        and left[name].shape == right[name].shape
        and torch.equal(bits(left[name]), bits(right[name]))
        for name in left
    )


def copied(state: Mapping[str, torch.Tensor]) -> State:
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def tuned(state: Mapping[str, torch.Tensor], *names: str, seed: int = 0) -> State:
    """Return a state in which some elements of the named tensors differ; of all tensors, if none is named."""
    result = copied(state)
    generator = torch.Generator().manual_seed(seed)
    for name in names or result:
        flat = result[name].view(VIEWS[result[name].element_size()]).view(-1)
        chosen = torch.randperm(len(flat), generator=generator)[: max(1, len(flat) // 5)]
        flat[chosen] ^= 1
    return result


class Disk:
    """A folder for states and the deltas between them."""

    def __init__(self, path: Path, context: ExitStack) -> None:
        self.path = path
        self.context = context
        self.n_saved = 0

    def save(self, state: Mapping[str, torch.Tensor]) -> Path:
        self.n_saved += 1
        path = self.path / f"state-{self.n_saved}.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
        return path

    def save_files(self, files: Mapping[str, Mapping[str, torch.Tensor]]) -> Path:
        """Write weight files, given by their paths, into a folder; return the folder."""
        self.n_saved += 1
        folder = self.path / f"state-{self.n_saved}"
        for path, state in files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / path)
        return folder

    def diff(
        self,
        base: Mapping[str, torch.Tensor],
        target: Mapping[str, torch.Tensor],
        values: str = "ulp",
    ) -> Delta:
        """Return the delta between two states, saved and loaded again."""
        return self.diff_paths(self.save(base), self.save(target), values=values)

    def diff_files(
        self,
        base: Mapping[str, Mapping[str, torch.Tensor]],
        target: Mapping[str, Mapping[str, torch.Tensor]],
    ) -> Delta:
        """Return the delta between two folders of weight files."""
        return self.diff_paths(self.save_files(base), self.save_files(target))

    def diff_paths(self, base: Path, target: Path, **options: Any) -> Delta:
        """Return the delta between two checkpoints, saved and loaded again."""
        path = target.with_suffix(".sd")
        with sparsedelta.diff(base, target, **options) as delta:
            delta.save(path)
        return self.context.enter_context(sparsedelta.load(path))

    def load(self, path: Path) -> State:
        return load_file(path)


def disk(path: Path) -> Iterator[Disk]:
    with ExitStack() as context:
        yield Disk(path, context)

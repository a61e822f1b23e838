"""An engine's model with another layout than its checkpoint: fused projections, one half of them on each rank."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from channel.weights import State
from safetensors.torch import save_file

N_RANKS = 2


def checkpoint(step: int) -> State:
    """Return the weights after a step; each step changes a few elements of all tensors but the last."""
    generator = torch.Generator().manual_seed(5)
    shapes = {"q.weight": (16, 32), "k.weight": (8, 32), "v.weight": (8, 32), "norm": (32,)}
    state = {
        name: torch.randn(shape, generator=generator).to(torch.bfloat16)
        for name, shape in shapes.items()
    }
    state["scale"] = torch.arange(4, dtype=torch.float32)
    for number in range(1, step + 1):
        advance(state, number)
    return state


def advance(state: State, step: int) -> None:
    """Change weights in place as one step does."""
    for name, tensor in state.items():
        if name != "scale":
            tensor.view(-1)[step % 5 :: 11] += step


def save(folder: Path, step: int) -> Path:
    """Write the weights after a step as a checkpoint folder."""
    folder.mkdir(parents=True)
    save_file(checkpoint(step), folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


class FusedModel(torch.nn.Module):
    """The rank's rows of q, k and v in one parameter, and the rest whole.

    As in vLLM and SGLang, each parameter has a ``weight_loader``, which copies into a narrowed view.
    """

    def __init__(self, rank: int = 0) -> None:
        super().__init__()
        self.rank = rank
        self.qkv = torch.nn.Linear(32, 16, bias=False, dtype=torch.bfloat16)
        self.rest = torch.nn.Module()
        self.rest.norm = torch.nn.Parameter(torch.zeros(32, dtype=torch.bfloat16))
        self.rest.scale = torch.nn.Parameter(torch.zeros(4))
        self.qkv.weight.__dict__["weight_loader"] = self._load_rows
        self.loaded: list[set[str]] = []

    def _load_rows(self, param: torch.nn.Parameter, loaded: torch.Tensor, part: str) -> None:
        start, size = {"q": (0, 8), "k": (8, 4), "v": (12, 4)}[part]
        rows = loaded.narrow(0, self.rank * size, size)
        param.data.narrow(0, start, size).copy_(rows)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Copy checkpoint tensors to their places; called by engines."""
        self.loaded.append(set())
        for name, tensor in weights:
            self.loaded[-1].add(name)
            part, _, _ = name.partition(".")
            if part in "qkv":
                weight: Any = self.qkv.weight
                weight.weight_loader(weight, tensor, part)
            else:
                param = self.rest.get_parameter(name)
                getattr(param, "weight_loader", _copied)(param, tensor)
        return self.loaded[-1]

    def is_at(self, step: int) -> bool:
        """Return whether the model holds exactly the weights after a step."""
        expected = FusedModel(self.rank)
        expected.load_weights(checkpoint(step).items())
        return all(
            torch.equal(one.view(torch.uint8), other.view(torch.uint8))
            for one, other in zip(self.parameters(), expected.parameters(), strict=True)
        )


def _copied(param: torch.nn.Parameter, loaded: torch.Tensor) -> None:
    param.data.copy_(loaded)

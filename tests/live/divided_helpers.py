"""Models that FSDP2 or tensor parallelism divides between ranks, for tests in real processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from live.live_helpers import State, same
from live.model_helpers import change, make, saved
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import sparsedelta
from sparsedelta.errors import SparseDeltaError

N_RANKS = 2


class Net(torch.nn.Module):
    """Sizes that ranks cannot divide evenly, a tied head, a buffer, and a parameter of one element."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(11, 6)
        self.up = torch.nn.Linear(6, 10)
        self.down = torch.nn.Linear(10, 6)
        self.head = torch.nn.Linear(6, 11, bias=False)
        self.to(torch.bfloat16)
        self.head.weight = self.embed.weight
        self.scale = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
        self.register_buffer("seen", torch.arange(50))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.head(self.down(self.up(self.embed(tokens))))
        return found


def changed(model: torch.nn.Module) -> None:
    change(model, every=3)
    with torch.no_grad():
        for buffer in model.buffers():
            if not buffer.is_floating_point():
                buffer.view(-1)[::7] += 1


def divided(model: Any, kind: str) -> Any:
    if kind == "state dict":
        return fully_shard(model).state_dict()
    if kind == "fsdp2":
        parts = [model.up, model.down] if isinstance(model, Net) else model.model.layers
        for module in parts:  # tied tensors must be in one group of FSDP2
            fully_shard(module)
        return fully_shard(model)
    names = {
        "tensor": ("tensor",),
        "both": ("shards", "tensor"),
        "replicas": ("replicas", "shards"),
    }
    sizes = {"tensor": (N_RANKS,), "both": (2, 2), "replicas": (2, 1)}
    mesh = init_device_mesh("cpu", sizes[kind], mesh_dim_names=names[kind])
    if kind == "replicas":
        return fully_shard(model, mesh=mesh)
    plan = {"embed": RowwiseParallel(), "up": ColwiseParallel(), "down": RowwiseParallel()}
    parallelize_module(model, mesh["tensor"], plan)
    return model if kind == "tensor" else fully_shard(model, mesh=mesh["shards"])


def whole(model: Any) -> State:
    state = model if isinstance(model, dict) else model.state_dict()
    return {
        name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        for name, tensor in state.items()
    }


def local(tensor: Any) -> torch.Tensor:
    found: torch.Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return found.detach()


def make_model(what: str) -> Any:
    return Net() if what == "net" else make(what)


class Case:
    """A divided model that holds a base, on one rank, and the states that it may have."""

    def __init__(self, folder: str, what: str, kind: str) -> None:
        base, target = make_model(what), make_model(what)
        changed(target)
        self.base, self.target = base.state_dict(), target.state_dict()
        self.model = divided(make_model(what), kind)
        self.delta = sparsedelta.load(f"{folder}/delta.sd")

    def is_at(self, state: State) -> bool:
        found: bool = same(whole(self.model), state)
        return found


def save_delta(folder: Path, what: str = "net", **options: Any) -> None:
    """Write ``delta.sd``, with the names of the model's checkpoint."""
    base, target = make_model(what), make_model(what)
    changed(target)
    if what != "net":
        base, target = saved(base, folder / "base"), saved(target, folder / "target")
    with sparsedelta.diff(base, target, **options) as delta:
        delta.save(folder / "delta.sd")


def weights(n_steps: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    master = torch.randn(127, 256, generator=generator) * 0.02
    for _ in range(n_steps):
        master += torch.randn(127, 256, generator=generator) * 3e-6
    return master.to(torch.bfloat16)


def outcome(work: Callable[[], object]) -> str:
    """Return the error that work raises, as text."""
    try:
        work()
    except (SparseDeltaError, OSError, TypeError, ValueError, KeyError, KeyboardInterrupt) as error:
        return f"{type(error).__name__}: {error}"
    return "none"

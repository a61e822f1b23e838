"""Deltas on models that run compiled, in a CUDA graph, in fp8, or with offloaded weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from live.live_helpers import Net, State, copied, same, tuned
from safetensors.torch import save_file
from torch import nn

import sparsedelta
from sparsedelta.errors import StructureMismatch

needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]
devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])


def saved_delta(folder: Path, base: State, target: State) -> Path:
    for name, state in (("base", base), ("target", target)):
        save_file(state, folder / f"{name}.safetensors")
    with sparsedelta.diff(folder / "base.safetensors", folder / "target.safetensors") as delta:
        delta.save(folder / "delta.sd")
    return folder / "delta.sd"


class Layers(nn.Module):
    """Two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(64, 64), nn.Linear(64, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the output of both."""
        out: torch.Tensor = self.last(torch.tanh(self.first(x)))
        return out


def doubled(model: nn.Module) -> State:
    """Return a state whose outputs differ from the model's."""
    return {name: 2 * tensor.detach() for name, tensor in model.state_dict().items()}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_captured_graph_uses_the_weights_of_the_active_delta(tmp_path: Path) -> None:
    """A CUDA graph reads the weights' memory, which a switch changes in place."""
    model = Layers().cuda().eval()
    path = saved_delta(tmp_path, copied(model.state_dict()), doubled(model))
    bank = sparsedelta.DeltaBank(model)
    bank.add("target", path)
    inputs = torch.randn(4, 64, device="cuda")
    with torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            model(inputs)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = model(inputs)
        before = model(inputs)
        for name in ("target", None, "target"):
            bank.activate(name)
            graph.replay()
            assert torch.equal(output, model(inputs))
            assert torch.equal(output, before) == (name is None)


@pytest.mark.slow
@devices
@pytest.mark.filterwarnings("ignore")  # of the compiler, about precision and deprecated modules
def test_a_compiled_model_uses_the_weights_of_the_active_delta(tmp_path: Path, device: str) -> None:
    model = Layers().to(device).eval()
    path = saved_delta(tmp_path, copied(model.state_dict()), doubled(model))
    backend = (
        "inductor" if device == "cuda" else "aot_eager"
    )  # on a CPU, inductor runs a C++ compiler
    compiled: Any = torch.compile(model, backend=backend)
    bank = sparsedelta.DeltaBank(compiled)
    bank.add("target", path)
    inputs = torch.randn(4, 64, device=device)
    with torch.no_grad():
        before = model(inputs)
        for name in (None, "target", None):
            bank.activate(name)
            output = compiled(inputs)
            torch.testing.assert_close(output, model(inputs))
            assert torch.allclose(output, before, rtol=1e-4, atol=1e-5) == (name is None)


@devices
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_weights_in_fp8(tmp_path: Path, device: str, dtype: torch.dtype) -> None:
    state = {"w": torch.randn(40, 30).to(dtype), "scale": torch.ones(1)}
    target = tuned(state)
    path = saved_delta(tmp_path, state, target)
    held = {name: tensor.to(device) for name, tensor in state.items()}
    with sparsedelta.load(path) as delta:
        delta.apply_(held, verify="full")
        assert same({name: tensor.cpu() for name, tensor in held.items()}, target)


@devices
def test_weights_on_several_devices(tmp_path: Path, device: str) -> None:
    net = Net()
    target = tuned(net.state_dict())
    path = saved_delta(tmp_path, copied(net.state_dict()), target)
    net.first.to(device)
    bank = sparsedelta.DeltaBank(net)
    bank.add("target", path)
    bank.activate("target")
    assert same({name: tensor.cpu() for name, tensor in net.state_dict().items()}, target)
    net.last.to(device)
    bank.activate(None)
    bank.activate("target")
    assert same({name: tensor.cpu() for name, tensor in net.state_dict().items()}, target)


@devices
def test_offloaded_weights_are_refused(tmp_path: Path, device: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    net = Net()
    path = saved_delta(tmp_path, copied(net.state_dict()), tuned(net.state_dict()))
    accelerate.cpu_offload(net, execution_device=torch.device(device))
    with (
        sparsedelta.load(path) as delta,
        pytest.raises(StructureMismatch, match=r"holds no data.*meta device"),
    ):
        delta.apply_(net)

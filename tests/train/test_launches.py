"""The number of launches on a device and of waits of the host is bounded."""

from __future__ import annotations

import pytest
import torch
from launch_counts import Counted
from torch import nn

from sift_train import SIFT, selection

N_LAYERS, WIDTH = 4, 1024


def make_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(N_LAYERS)))


@pytest.fixture
def as_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "CPU_SLICE", selection.DEVICE_SLICE)
    monkeypatch.setattr(selection, "RADIX_SELECT", ("cpu",))


@pytest.mark.usefixtures("as_on_a_device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_selection_of_tensors_of_a_million(dtype: torch.dtype) -> None:
    """At most 4 waits and 60 launches per tensor; three waits are counted, a copy to the host is not."""
    model = make_net().to(dtype)
    inputs = torch.randn(8, WIDTH, dtype=dtype)
    loss = model(inputs).square().mean()
    with SIFT(model, 0.05, "all-linear") as sift:
        loss = model(inputs).square().mean()
        with Counted() as counted:
            loss.backward()
        assert all(part.is_selected for part in sift.sparse_mapping.values())
    assert counted.waits.total() <= 3 * N_LAYERS, counted.waits
    assert counted.launches.total() <= 60 * N_LAYERS, counted.launches


@pytest.mark.slow
@pytest.mark.usefixtures("as_on_a_device")
def test_selection_of_a_tensor_of_45_million() -> None:
    model = nn.Linear(4096, 11008, bias=False)
    with SIFT(model, 0.05, "all-linear"):
        loss = model(torch.randn(1, 4096)).sum()
        with Counted() as counted:
            loss.backward()
    assert counted.waits.total() <= 3, counted.waits
    assert counted.launches.total() <= 60, counted.launches


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_step_waits_for_nothing(accumulation: int) -> None:
    """A step also has at most 6 launches per tensor more than the plain optimizer."""
    counts = []
    for is_ours in (False, True):
        model, inputs = make_net(), torch.randn(8, WIDTH)
        sift = SIFT(model, 0.05, "all-linear", grad_acc=accumulation) if is_ours else None
        trained = sift.parameters_in_optimizer() if sift else list(model.parameters())
        # Capturable, as fused is: a plain step reads its step count from the CPU.
        optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=True)

        def step(model: nn.Module = model, inputs: torch.Tensor = inputs) -> None:
            for _ in range(accumulation):
                (model(inputs).square().mean() / accumulation).backward()
            optimizer.step()  # noqa: B023 - called at once
            optimizer.zero_grad()  # noqa: B023

        step()
        with Counted() as counted:
            step()
        counts.append(counted)
    plain, ours = counts
    assert ours.waits.total() == 0, ours.waits
    assert ours.launches.total() <= plain.launches.total() + 6 * N_LAYERS, ours.launches

"""Grown components are trained as by an Adam of their own that began when they were grown."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sift_train import SIFT

SHAPE = (20, 10)
ADAMS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, betas=(0.0, 0.95), foreach=True),
    "adamw-amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True, maximize=True),
    "adam": lambda p: torch.optim.Adam(p, lr=torch.tensor(1e-2), weight_decay=0.1),
}


class Linear(nn.Module):
    """A model whose gradient is its input."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(SHAPE))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = (self.weight * x).sum()
        return out


def gradients(n: int, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(n, *SHAPE, generator=generator))


def run(sift: SIFT, optimizer: torch.optim.Optimizer, batches: list[Tensor]) -> None:
    for batch in batches:
        sift.model(batch).backward()
        optimizer.step()
        optimizer.zero_grad()


def alone(values: Tensor, name: str, batches: list[Tensor], at: Tensor) -> Tensor:
    """Return what components become that an optimizer of their own trains from their first step on."""
    own = nn.Parameter(values.clone())
    optimizer = ADAMS[name]([own])
    for batch in batches:
        own.grad = batch.flatten()[at]
        optimizer.step()
    return own.detach()


@pytest.mark.parametrize("name", ADAMS)
def test_a_grown_component_is_trained_as_from_its_own_first_step(name: str) -> None:
    """Grown twice, with steps of different numbers before."""
    sift = SIFT(Linear(), 0.2, ["weight"], lr_transfer=False)
    part = sift.sparse_mapping["weight"]
    optimizer = ADAMS[name](sift.parameters_in_optimizer())
    batches = gradients(90)
    born = torch.full((200,), -1)  # the step at which each component was grown; -1: not trained
    began = torch.zeros(200)
    for start, end in ((0, 40), (40, 60), (60, 90)):
        if start:
            with sift.reselecting(optimizer, share=0.4):
                pass
        is_trained = torch.zeros(200, dtype=torch.bool)
        is_trained[part.flat_index] = True
        is_new = is_trained & (born < 0)
        born[is_new] = start
        born[~is_trained] = -1
        began[is_new] = part.parameter.detach().flatten()[is_new]
        run(sift, optimizer, batches[start : start + 1])
        first = (part.parameter.detach().flatten() - began)[is_new]
        assert float(first.abs().max()) < 1.5e-2  # about the learning rate, and weight decay
        run(sift, optimizer, batches[start + 1 : end])
    assert len(born.unique()) == 4
    for start in (0, 40, 60):
        at = (born == start).nonzero().flatten()
        wanted = alone(began[at], name, batches[start:], at)
        found = part.parameter.detach().flatten()[at]
        torch.testing.assert_close(found, wanted, atol=2e-6, rtol=0.0)


def test_components_that_stay_keep_their_bits() -> None:
    found = []
    for moves in (False, True):
        sift = SIFT(Linear(), 0.2, ["weight"], lr_transfer=False)
        optimizer = ADAMS["adamw"](sift.parameters_in_optimizer())
        run(sift, optimizer, gradients(40))
        before = sift.sparse_mapping["weight"].flat_index
        if moves:
            with sift.reselecting(optimizer, share=0.4):
                pass
        run(sift, optimizer, gradients(10, seed=2))
        found.append(
            (
                sift.sparse_mapping["weight"].parameter.detach().flatten(),
                before,
                sift.sparse_mapping["weight"],
            )
        )
        sift.close()
    stays = found[0][1][torch.isin(found[0][1], found[1][2].flat_index)]
    assert len(stays) == 25
    assert torch.equal(found[0][0][stays], found[1][0][stays])


def test_the_learning_rate_is_the_one_of_the_step() -> None:
    """With lr_transfer it is larger than the optimizer shows."""
    sift = SIFT(Linear(), 0.2, ["weight"])
    optimizer = ADAMS["adam"](sift.parameters_in_optimizer())
    sift.lr_share = 0.5
    run(sift, optimizer, gradients(40))
    before = sift.sparse_mapping["weight"].parameter.detach().clone()
    held = set(sift.sparse_mapping["weight"].flat_index.tolist())
    with sift.reselecting(optimizer, share=0.4, dropped="keep"):
        pass
    sift.lr_share = 0.5
    run(sift, optimizer, gradients(1, seed=3))
    new = torch.tensor(sorted(set(sift.sparse_mapping["weight"].flat_index.tolist()) - held))
    moved = (sift.sparse_mapping["weight"].parameter.detach() - before).flatten()[new].abs()
    torch.testing.assert_close(moved, torch.full_like(moved, 2e-2), atol=1e-6, rtol=1e-3)


def test_a_step_that_changes_nothing_is_not_corrected() -> None:
    """A step without a gradient, and a fused one that a gradient scaler skips inside the kernel."""
    sift = SIFT(Linear(), 0.2, ["weight"], lr_transfer=False)
    optimizer = ADAMS["adamw-fused"](sift.parameters_in_optimizer())
    run(sift, optimizer, gradients(40))
    with sift.reselecting(optimizer, share=0.4):
        pass
    run(sift, optimizer, gradients(2, seed=2))
    before = sift.sparse_mapping["weight"].parameter.detach().clone()
    optimizer.step()
    assert torch.equal(sift.sparse_mapping["weight"].parameter, before)
    scaler = torch.amp.GradScaler("cpu")
    bad = gradients(1)[0].index_fill(0, torch.arange(20), torch.inf)
    scaler.scale(sift.model(bad)).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(sift.sparse_mapping["weight"].parameter, before)
    optimizer.zero_grad()
    run(sift, optimizer, gradients(1))
    assert not torch.equal(sift.sparse_mapping["weight"].parameter, before)

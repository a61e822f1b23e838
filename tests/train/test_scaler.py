"""Gradient scalers: the steps they skip, and gradients that they have read too early."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from train_helpers import make_inputs, make_net, same_bits, snapshot, square_loss

from sift_train import SIFT


def sgd(sift: SIFT) -> torch.optim.Optimizer:
    return torch.optim.SGD(sift.parameters_in_optimizer(), lr=0.1)


def test_a_step_that_a_gradient_scaler_skips_changes_nothing() -> None:
    model = make_net()
    before = snapshot(model)
    batch = make_inputs(1)[0]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**100)
    poison = torch.tensor(torch.inf)
    model.first.weight.register_hook(lambda gradient: gradient * poison)
    with SIFT(model, 0.1, "first.weight", selection="gradient") as sift:
        optimizer = sgd(sift)
        part = sift.sparse_mapping["first.weight"]
        for _ in range(2):
            optimizer.zero_grad()
            scaler.scale(square_loss(model, batch)).backward()
            scaler.step(optimizer)
            scaler.update()
        assert all(same_bits(value, model.state_dict()[name]) for name, value in before.items())
        assert scaler.get_scale() == 2.0**98
        assert not part.is_selected
        poison.fill_(1.0)
        optimizer.zero_grad()
        scaler.scale(square_loss(model, batch)).backward()
        scaler.step(optimizer)
        assert int((before["first.weight"] != model.first.weight).sum()) == part.train_num


@pytest.mark.parametrize("settings", [{"grad_acc": 2}, {"budget": "global"}], ids=["acc", "global"])
@pytest.mark.parametrize("reads", ["step", "unscale", "unscale and clip", "unscale and sync"])
@pytest.mark.parametrize("fused", [False, True])
def test_a_choice_after_a_scaler_has_unscaled_is_refused(
    settings: dict[str, Any], reads: str, *, fused: bool
) -> None:
    """The dense bias has a gradient in time, so the scaler itself finds nothing amiss."""

    def step(*, scale: float, finishes: bool) -> Tensor:
        model = make_net()
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale > 1)
        targets = ["first.weight", "first.bias"]
        with SIFT(
            model, 0.1, targets, exception=["first.bias"], selection="gradient", **settings
        ) as sift:
            optimizer = torch.optim.SGD(sift.parameters_in_optimizer(), lr=0.1, fused=fused)
            for batch in make_inputs(2):
                scaler.scale(square_loss(model, batch)).backward()
            if finishes:
                sift.finish_selection()
            if "unscale" in reads:
                scaler.unscale_(optimizer)
            if "clip" in reads:
                sift.clip_grad_norm_(1.0)
            if "sync" in reads:
                sift.sync_gradients()
            scaler.step(optimizer)
            return model.first.weight.detach().clone()

    expected = step(scale=1.0, finishes=False)
    assert torch.equal(step(scale=2.0**16, finishes=True), expected)
    if fused and reads == "step":  # it unscales in its own step
        assert torch.equal(step(scale=2.0**16, finishes=False), expected)
        return
    with pytest.raises(RuntimeError, match=r"call sift\.finish_selection\(\) before each"):
        step(scale=2.0**16, finishes=False)


def test_a_scaler_of_another_model_does_not_matter() -> None:
    other = make_net()
    scaler = torch.amp.GradScaler("cpu")
    others = torch.optim.SGD(other.parameters(), lr=0.1)
    scaler.scale(square_loss(other, make_inputs(1)[0])).backward()
    scaler.unscale_(others)
    with SIFT(make_net(), 0.1, selection="gradient", grad_acc=2) as sift:
        optimizer = sgd(sift)
        square_loss(sift.model, make_inputs(1)[0]).backward()
        optimizer.step()
        assert all(part.is_trained for part in sift.sparse_mapping.values())
    scaler.step(others)

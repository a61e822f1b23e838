"""Deltas coded by their base's exponents, applied to a model in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from live.live_helpers import bits
from safetensors.torch import save_file
from torch import nn

import sparsedelta
from sparsedelta.errors import BaseMismatch, BaseNeeded
from sparsedelta.live.inplace import apply_, revert_


def weights(n_steps: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    master = torch.randn(128, 256, generator=generator) * 0.02
    for _ in range(n_steps):
        master += torch.randn(128, 256, generator=generator) * 3e-6
    return master.to(torch.bfloat16)


def model(n_steps: int) -> nn.Linear:
    made = nn.Linear(256, 128, bias=False, dtype=torch.bfloat16)
    made.weight.data = weights(n_steps)
    return made


@pytest.fixture
def delta(tmp_path: Path) -> Path:
    for n in range(2):
        save_file({"weight": weights(n)}, tmp_path / f"{n}.safetensors")
    with sparsedelta.diff(tmp_path / "0.safetensors", tmp_path / "1.safetensors") as made:
        assert any(c.needs_base for row in made.tensors if row.change for c in row.change.chunks)
        made.save(tmp_path / "delta.sd")
    return tmp_path / "delta.sd"


def test_the_models_own_weights_are_the_base(delta: Path) -> None:
    one = model(0)
    with sparsedelta.load(delta) as loaded:
        apply_(loaded, one)
        assert torch.equal(bits(one.weight), bits(weights(1)))
        with pytest.raises(BaseNeeded):
            revert_(loaded, one)


def test_another_model_is_refused_and_left_alone(delta: Path) -> None:
    one = model(1)
    with sparsedelta.load(delta) as loaded, pytest.raises(BaseMismatch):
        apply_(loaded, one)
    assert torch.equal(bits(one.weight), bits(weights(1)))


def test_weights_that_are_not_contiguous(delta: Path) -> None:
    one = model(0)
    one.weight.data = weights(0).t().contiguous().t()
    with sparsedelta.load(delta) as loaded:
        apply_(loaded, one)
    assert torch.equal(bits(one.weight.contiguous()), bits(weights(1)))

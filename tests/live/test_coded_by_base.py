"""Deltas that are coded with the exponents of their base, applied to a model in memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import small_chunks
from live.live_helpers import bits
from safetensors.torch import save_file
from torch import nn

import sparsedelta
from sparsedelta.errors import AlreadyApplied, BaseMismatch, BaseNeeded, Corrupt
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


@pytest.fixture(params=[1 << 24, 1 << 14])
def delta(tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a delta of one chunk, or of several, each of which needs the base."""
    small_chunks(monkeypatch, request.param, 1 << 19)
    for n in range(2):
        save_file({"weight": weights(n)}, tmp_path / f"{n}.safetensors")
    with sparsedelta.diff(tmp_path / "0.safetensors", tmp_path / "1.safetensors") as made:
        assert all(chunk.coding.classes for row in made.tensors for chunk in row.chunks)
        made.save(tmp_path / "delta.sd")
    return tmp_path / "delta.sd"


def test_the_models_own_weights_are_the_base(delta: Path) -> None:
    one = model(0)
    with sparsedelta.load(delta) as loaded:
        apply_(loaded, one)
        assert torch.equal(bits(one.weight), bits(weights(1)))
        with pytest.raises(BaseNeeded):
            revert_(loaded, one)


@pytest.mark.parametrize("verify", ["touched", "full"])
@pytest.mark.parametrize(("n_steps", "error"), [(1, AlreadyApplied), (2, BaseMismatch)])
def test_another_model_is_refused_and_left_alone(
    delta: Path, n_steps: int, error: type[Exception], verify: Any
) -> None:
    one = model(n_steps)
    with sparsedelta.load(delta) as loaded, pytest.raises(error):
        apply_(loaded, one, verify=verify)
    assert torch.equal(bits(one.weight), bits(weights(n_steps)))


def test_a_delta_that_cannot_be_decoded_with_its_base(delta: Path) -> None:
    """The base is correct, so the delta is reported as corrupt."""
    one = model(0)
    with sparsedelta.load(delta) as loaded:
        (row,) = loaded.tensors
        chunks = tuple(replace(c, nnz=c.nnz - 1) if c.coding.classes else c for c in row.chunks)
        wrong = replace(loaded, tensors=(replace(row, chunks=chunks),))
        with pytest.raises(Corrupt):
            apply_(wrong, one)
    assert torch.equal(bits(one.weight), bits(weights(0)))


def test_weights_that_are_not_contiguous(delta: Path) -> None:
    one = model(0)
    one.weight.data = weights(0).t().contiguous().t()
    with sparsedelta.load(delta) as loaded:
        apply_(loaded, one)
    assert torch.equal(bits(one.weight.contiguous()), bits(weights(1)))

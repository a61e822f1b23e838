"""Deltas that are coded with the exponents of their base, applied to a model in memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import small_chunks
from live.live_helpers import bits
from safetensors.torch import save_file
from torch import nn

import sparsedelta
from sparsedelta.codecs.exponent_classes import Choice, class_table, keys_of
from sparsedelta.errors import AlreadyApplied, BaseMismatch, BaseNeeded, Corrupt
from sparsedelta.live import decoding
from sparsedelta.live.classes import find_on_device
from sparsedelta.live.inplace import apply_, revert_


def weights(n_steps: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    master = torch.randn(128, 256, generator=generator) * 0.02
    for _ in range(n_steps):
        master += torch.randn(128, 256, generator=generator) * 3e-6
    return master.to(torch.bfloat16)


def model(n_steps: int, device: str) -> nn.Linear:
    made = nn.Linear(256, 128, bias=False, dtype=torch.bfloat16)
    made.weight.data = weights(n_steps)
    return made.to(device)


def holds(one: nn.Linear, n_steps: int) -> bool:
    return torch.equal(bits(one.weight.cpu().contiguous()), bits(weights(n_steps)))


@pytest.fixture(
    params=["host", "as on a device", pytest.param("cuda", marks=pytest.mark.gpu)], autouse=True
)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where the model is, and where its elements are searched."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if request.param == "as on a device":
        monkeypatch.setattr(decoding, "HOST", frozenset())
    return "cuda" if request.param == "cuda" else "cpu"


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


def test_the_models_own_weights_are_the_base(delta: Path, device: str) -> None:
    one = model(0, device)
    with sparsedelta.load(delta) as loaded:
        apply_(loaded, one)
        assert holds(one, 1)
        with pytest.raises(BaseNeeded):
            revert_(loaded, one)


@pytest.mark.parametrize("verify", ["touched", "full"])
@pytest.mark.parametrize(("n_steps", "error"), [(1, AlreadyApplied), (2, BaseMismatch)])
def test_another_model_is_refused_and_left_alone(
    delta: Path, device: str, n_steps: int, error: type[Exception], verify: Any
) -> None:
    one = model(n_steps, device)
    with sparsedelta.load(delta) as loaded, pytest.raises(error):
        apply_(loaded, one, verify=verify)
    assert holds(one, n_steps)


def test_a_delta_that_cannot_be_decoded_with_its_base(delta: Path, device: str) -> None:
    """The base is correct, so the delta is reported as corrupt."""
    one = model(0, device)
    with sparsedelta.load(delta) as loaded:
        (row,) = loaded.tensors
        chunks = tuple(replace(c, nnz=c.nnz - 1) if c.coding.classes else c for c in row.chunks)
        wrong = replace(loaded, tensors=(replace(row, chunks=chunks),))
        with pytest.raises(Corrupt):
            apply_(wrong, one)
    assert holds(one, 0)


def test_weights_that_are_not_contiguous(delta: Path, device: str) -> None:
    one = model(0, device)
    one.weight.data = one.weight.data.t().contiguous().t()
    with sparsedelta.load(delta) as loaded:
        apply_(loaded, one)
    assert holds(one, 1)


@pytest.mark.parametrize("width", [1, 2, 4, 8])
@pytest.mark.parametrize("density", [0.03, 0.5, 0.97])
def test_the_device_finds_what_the_host_finds(width: int, density: float, device: str) -> None:
    """Also where the ranks are those of the elements that are not chosen."""
    draw = np.random.default_rng(width)
    span = 5000
    elements = draw.integers(0, 1 << 8 * width - 1, span, np.uint64).astype(f"<u{width}")
    thresholds = (20, 60, 61, 127)
    class_of = class_table(thresholds)[keys_of(elements)]
    chosen = draw.random(span) < density
    listed = []
    for number in range(len(thresholds) + 1):
        of_rest = number % 2 == 1
        own = chosen[class_of == number] != of_rest
        listed.append((np.flatnonzero(own).astype(np.uint32), of_rest))
    choice = Choice(span, int(chosen.sum()), thresholds, listed)
    flat = torch.from_numpy(elements.view(f"<i{width}")).to(device)
    assert find_on_device(choice, flat).tolist() == np.flatnonzero(chosen).tolist()
    found, _ = choice.find(lambda start, n: elements[start : start + n])
    assert found.tolist() == np.flatnonzero(chosen).tolist()
    n_members = int((class_of == 0).sum())
    beyond = [(np.array([n_members], np.uint32), False), *listed[1:]]
    n_others = int(chosen[class_of > 0].sum())
    for wrong in (
        replace(choice, nnz=choice.nnz + 1),
        Choice(span, n_others + 1, thresholds, beyond),
    ):
        with pytest.raises(Corrupt):
            find_on_device(wrong, flat)
        with pytest.raises(Corrupt):
            wrong.find(lambda start, n: elements[start : start + n])

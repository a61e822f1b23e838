"""Channels of models whose checkpoints have other tensors: merged experts (Mixtral), a divided ``qkv`` (NomicBert)."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from channel.parties import MemoryStore
from live.architectures import make_small, step
from safetensors import safe_open

import sparsedelta
from sparsedelta.channel.publisher import publish_checkpoint

N_VERSIONS = 3


@pytest.fixture(scope="module", params=["MixtralForCausalLM", "NomicBertForMaskedLM"])
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Return a checkpoint for each version."""
    root = tmp_path_factory.mktemp("versions")
    model = make_small(request.param)
    found = []
    for version in range(1, N_VERSIONS + 1):
        found.append(root / str(version))
        model.save_pretrained(found[-1])
        step(model)
    return found


def load(folder: Path) -> Any:
    config = transformers.AutoConfig.from_pretrained(folder)
    cls = getattr(transformers, config.architectures[0])
    return cls.from_pretrained(folder, dtype=torch.bfloat16)


def assert_is(model: torch.nn.Module, folder: Path) -> None:
    expected = load(folder).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.view(torch.int16), expected[name].view(torch.int16)), name


@pytest.mark.parametrize("begin", ["another", "first"])
def test_a_follower_on_a_converted_model(folders: list[Path], begin: str) -> None:
    """It gets a whole version if it has none; then, at once, the two that it has missed."""
    channel = sparsedelta.Channel(MemoryStore())
    publish_checkpoint(channel, folders[0])
    model = load(folders[0])
    with safe_open(folders[0] / "model.safetensors", "pt") as file:
        assert set(file.keys()) - set(model.state_dict())
    if begin == "another":
        step(model)
    follower = sparsedelta.Follower(channel, model)
    report = follower.sync()
    assert report.n_versions == (begin == "another")
    assert_is(model, folders[0])
    for before, folder in pairwise(folders):
        publish_checkpoint(channel, folder, base=before)
    report = follower.sync()
    assert (report.version, report.n_versions, report.anchor) == (N_VERSIONS, 2, False)
    assert_is(model, folders[-1])

"""Tensors of a model that share a part of their memory, and tensors without elements."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import sparsedelta
from sparsedelta.errors import StructureMismatch
from sparsedelta.live.slots import sharing_memory

State = dict[str, torch.Tensor]


def sharing(kind: str) -> State:
    """Return a state of which ``head`` lies in ``emb``."""
    emb = torch.arange(24.0).reshape(6, 4)
    return {"emb": emb, "head": emb[:4] if kind == "part" else emb.t()}


def apart(state: State) -> State:
    return {name: tensor.clone() for name, tensor in state.items()}


@pytest.mark.parametrize("kind", ["part", "transposed"])
def test_a_follower_whose_tensors_overlap(tmp_path: Path, kind: str) -> None:
    """It holds what overlaps in the published model, too, and says so if that is apart there."""
    published = sharing(kind)
    with sparsedelta.Publisher(tmp_path / "same", published) as publisher:
        held = sharing(kind)
        for step in (1, 2):
            published["emb"][1, 2] += step
            publisher.publish(step).result()
            assert sparsedelta.Follower(tmp_path / "same", held).sync().version == step
            assert all(torch.equal(held[name], published[name]) for name in published)
    published = apart(published)
    published["head"][0, 1] = 100
    sparsedelta.Publisher(tmp_path / "apart", published).publish(1).result()
    with sparsedelta.Follower(tmp_path / "apart", sharing(kind)) as follower:
        with pytest.raises(StructureMismatch, match="shares a part of its memory with another one"):
            follower.sync()
        with follower.reading() as version:
            assert version is None


def test_a_delta_that_changes_one_of_two_that_overlap(tmp_path: Path) -> None:
    held = sharing("part")
    base, target = apart(held), apart(held)
    target["emb"][0, 0] += 1
    save_file(base, tmp_path / "base.safetensors")
    with sparsedelta.diff(tmp_path / "base.safetensors", target) as delta:
        with pytest.raises(
            StructureMismatch, match="share a part of their memory in the model, and only"
        ):
            delta.apply_(held)
        assert torch.equal(held["emb"], base["emb"])
        delta.apply_(base)
    assert torch.equal(base["emb"], target["emb"])


def test_what_shares_memory() -> None:
    whole = torch.zeros(8, 6)
    fused = [whole[:, :3], whole[:, 3:]]  # neither has an element of the other
    assert sharing_memory(fused) == [(0, 1)]
    assert sharing_memory(fused, surely=True) == []
    assert sharing_memory([whole[:4], whole[4:], torch.zeros(2), torch.zeros(0)]) == []
    assert sharing_memory([whole[1], whole[5], whole], surely=True) == [(2, 0), (2, 1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("shape", [(0,), (0, 4), (4, 0)])
def test_tensors_without_elements(
    tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    state = {"none": torch.zeros(shape, dtype=dtype), "w": torch.arange(30.0)}
    sparsedelta.Publisher(tmp_path / "channel", state).publish(1).result()
    held = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    assert sparsedelta.Follower(tmp_path / "channel", held).sync().version == 1
    assert torch.equal(held["w"], state["w"])
    save_file(held, tmp_path / "base.safetensors")
    with sparsedelta.diff(tmp_path / "base.safetensors", {**held, "w": held["w"] + 1}) as delta:
        delta.apply_(held)
    assert torch.equal(held["w"], state["w"] + 1)

"""A model that keeps some tensors in F32, which its checkpoint has in BF16 or in F32 too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from channel.parties import MemoryStore
from live.architectures import make_small, step

import sparsedelta
from sparsedelta.channel.publisher import publish_checkpoint
from sparsedelta.errors import StructureMismatch

FAMILIES = ["MixtralForCausalLM", "NomicBertForMaskedLM"]


def mixed(family: str) -> Any:
    """Return a model in bf16 with its norms in F32, as transformers keeps modules in F32."""
    model = make_small(family)
    for name, module in model.named_modules():
        if "norm" in name.rpartition(".")[2].lower():
            module.float()
    assert {p.dtype for p in model.parameters()} == {torch.float32, torch.bfloat16}
    return model


def bits(model: torch.nn.Module) -> list[bytes]:
    return [t.view(torch.uint8).numpy().tobytes() for t in model.state_dict().values()]


@pytest.mark.parametrize("family", FAMILIES)
def test_each_tensor_is_published_in_its_own_dtype(family: str, tmp_path: Path) -> None:
    model, held = mixed(family), mixed(family)
    channel = sparsedelta.Channel(MemoryStore())
    with sparsedelta.Publisher(channel, model) as publisher:
        publisher.publish(0).result()
        sparsedelta.Follower(channel, held).sync()
        step(model)
        publisher.publish(1).result()
    report = sparsedelta.Follower(channel, held).sync()
    assert (report.before, report.version) == (1, 2)
    assert bits(held) == bits(model)
    sparsedelta.Follower(channel, tmp_path / "out").sync()
    model.save_pretrained(tmp_path / "saved")
    saved = (tmp_path / "saved" / "model.safetensors").read_bytes()
    assert (tmp_path / "out").read_bytes() == saved


@pytest.mark.parametrize("family", FAMILIES)
def test_another_dtype_than_the_checkpoint_is_one_sentence(family: str, tmp_path: Path) -> None:
    """Both ways: nothing is cast, and nothing is changed or published."""
    model, plain = mixed(family), make_small(family)
    plain.save_pretrained(tmp_path / "plain")
    model.save_pretrained(tmp_path / "mixed")
    before = bits(model), bits(plain)
    for one, other in ((model, "plain"), (plain, "mixed")):
        channel = sparsedelta.Channel(MemoryStore())
        with pytest.raises(StructureMismatch, match=r"in memory and .*; save the model"):
            sparsedelta.Publisher(channel, one, folder=tmp_path / other)
        assert channel.head() is None
        publish_checkpoint(channel, tmp_path / other)
        with pytest.raises(StructureMismatch, match=r"norm.* is (B?F\d\d) .*(B?F\d\d)"):
            sparsedelta.Follower(channel, one).sync()
    assert (bits(model), bits(plain)) == before

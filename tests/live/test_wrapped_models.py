"""Deltas on models that other libraries wrap or quantize, of a family whose experts are fused in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from live.live_helpers import copied, same
from live.model_helpers import change, make, saved
from safetensors.torch import load_file, save_file
from torch import nn

import sparsedelta
from sparsedelta import DeltaBank
from sparsedelta.errors import StructureMismatch


class Case:
    """A model, its checkpoint, its states before and after a delta, and the delta."""

    def __init__(self, kind: str, path: Path, **diff: Any) -> None:
        self.model = make(kind)
        self.base = copied(self.model.state_dict())
        folders = saved(self.model, path / "base"), path / "target"
        change(self.model)
        self.target = copied(self.model.state_dict())
        saved(self.model, folders[1])
        self.model.load_state_dict(self.base)
        self.delta = path / "d.sd"
        with sparsedelta.diff(*folders, **diff) as delta:
            delta.save(self.delta)

    def check(self, wrapped: Any) -> None:
        """Check that the delta, applied to a wrapped model, changes the model inside as it must."""
        with sparsedelta.load(self.delta) as delta:
            with delta.applied(wrapped, verify="full"):
                assert same(self.own(), self.target)
            assert same(self.own(), self.base)
        bank = DeltaBank(wrapped)
        bank.add("one", self.delta)
        bank.activate("one")
        assert same(self.own(), self.target)

    def own(self) -> dict[str, torch.Tensor]:
        return {
            name.replace(".base_layer", ""): tensor
            for name, tensor in self.model.state_dict().items()
            if "lora_" not in name
        }


# PEFT warns of what it changes in torch and transformers.
PEFT_WARNS = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.fixture
def mixtral(tmp_path: Path) -> Case:
    return Case("mixtral", tmp_path)


@PEFT_WARNS
def test_adapters_of_peft(mixtral: Case) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2)
    mixtral.check(peft.get_peft_model(mixtral.model, config))


@PEFT_WARNS
def test_adapters_of_fused_experts(mixtral: Case) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"], r=2
    )
    mixtral.check(peft.get_peft_model(mixtral.model, config))


def test_data_parallel(mixtral: Case) -> None:
    mixtral.check(nn.DataParallel(mixtral.model))


def test_a_sentence_encoder_with_legacy_names(tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers")
    import transformers
    from sentence_transformers import SentenceTransformer

    model = make("bert").bert
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]))
    tokenizer: Any = transformers.BertTokenizer
    for folder in ("base", "target"):
        path = saved(model, tmp_path / folder) / "model.safetensors"
        names = {name: name.replace("Norm.weight", "Norm.gamma") for name in load_file(path)}
        save_file({names[n]: t for n, t in load_file(path).items()}, path, {"format": "pt"})
        tokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / folder)
        change(model, skip="query")
    encoder, wanted = (
        SentenceTransformer(str(tmp_path / folder), device="cpu") for folder in ("base", "target")
    )
    before = copied(encoder.state_dict())
    with sparsedelta.diff(tmp_path / "base", tmp_path / "target") as delta:
        with delta.applied(encoder, verify="full"):
            assert same(encoder.state_dict(), wanted.state_dict())
        assert same(encoder.state_dict(), before)


def test_quantized_models(mixtral: Case) -> None:
    model: Any = mixtral.model
    model.hf_quantizer = object()
    with (
        sparsedelta.load(mixtral.delta) as delta,
        pytest.raises(StructureMismatch, match=r"MixtralForCausalLM is quantized.*\(load_model\)$"),
    ):
        delta.apply_(model)
    assert same(model.state_dict(), mixtral.base)


def test_tied_heads(tmp_path: Path) -> None:
    case = Case("tied qwen2-moe", tmp_path)
    case.check(case.model)
    head = case.model.lm_head.weight
    assert head.data_ptr() == case.model.model.embed_tokens.weight.data_ptr()

"""Quantized weights are refused; what a quantized model keeps in full precision is trained, exactly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from train_helpers import make_net

import sparsedelta
from sift_train import SIFT, export_delta

REFUSED = (
    r"^parameter '[^']+' is quantized \({}\), and a packed weight holds rounded numbers, so a delta cannot state a"
    r" trained component exactly; load the model unquantized, or train parameters that are not quantized"
)


def make_llama(folder: Path) -> Path:
    config: Any = transformers.LlamaConfig
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4}
    transformers.LlamaForCausalLM(config(**sizes, **heads)).bfloat16().save_pretrained(folder)
    return folder


def loaded(folder: Path, **options: Any) -> Any:
    make: Any = transformers.AutoModelForCausalLM
    return make.from_pretrained(folder, **options)


def bits(n: int) -> Callable[[Path], Any]:
    def load(folder: Path) -> Any:
        pytest.importorskip("bitsandbytes")
        settings: Any = transformers.BitsAndBytesConfig
        return loaded(folder, quantization_config=settings(**{f"load_in_{n}bit": True}))

    return load


def torchao(folder: Path) -> Any:
    quantization = pytest.importorskip("torchao.quantization")
    model = loaded(folder)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("load", "kind"), [(bits(4), "Params4bit"), (bits(8), "Int8Params"), (torchao, "Int8Tensor")]
)
def test_quantized_weights_are_refused(tmp_path: Path, load: Any, kind: str) -> None:
    model = load(make_llama(tmp_path / "base"))
    for sparse_module in ("all-linear", "q_proj"):
        with pytest.raises(ValueError, match=REFUSED.format(kind)):
            SIFT(model, 0.1, sparse_module)
    with SIFT(model, 0.5, "norm") as sift:
        assert sift.n_trained


@pytest.mark.filterwarnings("ignore")
def test_the_norms_of_a_quantized_model_have_an_exact_delta(tmp_path: Path) -> None:
    base = make_llama(tmp_path / "base")
    model = bits(4)(base)
    model.save_pretrained(tmp_path / "quantized")
    tokens = torch.arange(16).view(2, 8)
    with SIFT(model, 0.5, "norm") as sift:
        optimizer = torch.optim.SGD(sift.parameters_in_optimizer(), lr=1.0)
        for _ in range(2):
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        given: Any = {"sift": sift, "overwrite": True}
        nnz = export_delta(model, tmp_path / "d.sd", base=tmp_path / "quantized", **given)
        with pytest.raises(ValueError, match="is not the checkpoint of this model"):
            export_delta(model, tmp_path / "e.sd", base=base, **given)
    assert 0 < nnz <= sift.n_trained
    sparsedelta.apply(tmp_path / "quantized", tmp_path / "d.sd", tmp_path / "out")
    rebuilt = load_file(tmp_path / "out" / "model.safetensors")
    for name, parameter in model.named_parameters():
        held = parameter.detach().view(torch.uint8)
        assert torch.equal(rebuilt[name].view(torch.uint8), held)


class Packed(nn.Parameter):
    """A parameter as bitsandbytes makes it."""


Packed.__module__ = "bitsandbytes.nn.modules"


def test_packed_parameters_and_other_quantizers_are_refused_by_name() -> None:
    model: Any = make_net()
    model.first.weight = Packed(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match=REFUSED.format("Packed")):
        SIFT(model, 0.1, "first.weight")
    replaced: Any = nn.Sequential(nn.LayerNorm(4))  # such as GPTQ, which replaces linear layers
    replaced.hf_quantizer = Path()
    with pytest.raises(ValueError, match=r"its weights are quantized \(PosixPath\), and a packed"):
        SIFT(replaced, 0.1)

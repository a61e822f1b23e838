"""Adapters that PEFT wrote are merged as PEFT merges them, and PEFT reads the adapters that this package writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers import Raw, assert_same_files, write_file
from interop.interop_helpers import floats, pair, plain_pair, with_bits
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import sparsedelta
from sparsedelta.errors import Corrupt, SparseDeltaError, StructureMismatch, UnsupportedFeature

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's and torch's own
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class Model(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 12)
        self.proj = nn.Linear(12, 10)
        self.conv: nn.Module = Conv1D(7, 10)  # type: ignore[no-untyped-call]
        self.to(dtype)

    def forward(self, ids: torch.Tensor) -> Any:
        return self.conv(self.proj(self.embed(ids)))


def save_base(model: nn.Module, path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    save_file(
        {k: v.contiguous().clone() for k, v in model.state_dict().items()},
        path / "model.safetensors",
    )
    return path


def randomise(model: nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "shira_weight" in name:
                parameter.normal_(0, 0.05)


def check_merged(tmp_path: Path, dtype: torch.dtype, config: peft.PeftConfig) -> None:
    """Check that applying an adapter gives the bits of ``merge_and_unload``."""
    torch.manual_seed(0)
    model = Model(dtype)
    base = save_base(model, tmp_path / "base")
    tuned: Any = peft.get_peft_model(model, config)
    randomise(tuned)
    tuned.save_pretrained(tmp_path / "adapter")
    fresh = Model(dtype)
    fresh.load_state_dict(load_file(base / "model.safetensors"))
    loaded: Any = peft.PeftModel.from_pretrained(fresh, str(tmp_path / "adapter"))
    merged = loaded.merge_and_unload().state_dict()
    sparsedelta.apply(base, tmp_path / "adapter", tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == merged.keys()
    n_changed = 0
    for name, tensor in merged.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
        n_changed += not torch.equal(tensor, load_file(base / "model.safetensors")[name])
    assert n_changed >= 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["proj"], "r": 4, "lora_alpha": 7},
        {"target_modules": ["proj"], "r": 3, "use_rslora": True},
        {"target_modules": ["embed", "proj"], "r": 2},
        {"target_modules": ["embed", "proj"], "r": 2, "rank_pattern": {"proj": 5}, "alpha_pattern": {"embed": 3}},
        {"target_modules": ["conv"], "r": 4, "fan_in_fan_out": True},
    ],
    ids=str,
)  # fmt: skip
def test_lora_is_merged_as_peft_merges_it(
    options: dict[str, Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    check_merged(tmp_path, dtype, peft.LoraConfig(**options))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shira_is_merged_as_peft_merges_it(dtype: torch.dtype, tmp_path: Path) -> None:
    check_merged(tmp_path, dtype, peft.ShiraConfig(r=2, target_modules=["proj"]))


class One(nn.Module):
    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__()
        dtype = tensors["proj.weight"].dtype
        self.proj = nn.Linear(10, 12, bias=False, dtype=dtype)
        self.norm = nn.Linear(10, 1, bias=False, dtype=dtype)
        with torch.no_grad():
            self.proj.weight.copy_(tensors["proj.weight"])


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_peft_reads_the_shira_adapter_we_write(dtype: str, tmp_path: Path) -> None:
    given = plain_pair(tmp_path, dtype)
    sparsedelta.convert(given.delta, tmp_path / "adapter", base=given.base, write_as="shira")
    model = One(load_file(given.base / "model.safetensors"))
    loaded: Any = peft.PeftModel.from_pretrained(model, str(tmp_path / "adapter"))
    merged = loaded.merge_and_unload().proj.weight
    expected = load_file(given.target / "model.safetensors")["proj.weight"]
    assert torch.equal(merged, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "sets use_dora to true"),
        ({"bias": "all"}, "trains biases"),
        ({"modules_to_save": ["conv"]}, "sets modules_to_save"),
    ],
)
def test_what_is_not_merged_is_refused(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model = Model(torch.float32)
    base = save_base(model, tmp_path / "base")
    tuned: Any = peft.get_peft_model(model, peft.LoraConfig(target_modules=["proj"], **options))
    tuned.save_pretrained(tmp_path / "adapter")
    with pytest.raises(UnsupportedFeature, match=message):
        sparsedelta.apply(base, tmp_path / "adapter", tmp_path / "out")


def lora(path: Path, tensors: dict[str, Raw], **config: Any) -> Path:
    named = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
    write_file(path / "adapter_model.safetensors", named)
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, **config}
    (path / "adapter_config.json").write_text(json.dumps(settings))
    return path


A, B = "proj.lora_A.weight", "proj.lora_B.weight"
PLAIN = {A: floats("F32", 2, 10), B: floats("F32", 12, 2, seed=1)}


@pytest.mark.parametrize(
    ("tensors", "config", "error"),
    [
        ({A: PLAIN[A]}, {}, Corrupt),  # one matrix of two
        ({**PLAIN, B: floats("F32", 12, 3)}, {}, Corrupt),  # ranks that differ
        (PLAIN, {"r": 3}, Corrupt),
        (PLAIN, {"r": 0}, Corrupt),
        (PLAIN, {"lora_alpha": "many"}, Corrupt),
        (PLAIN, {"lora_alpha": None}, Corrupt),
        ({**PLAIN, B: floats("F32", 11, 2)}, {}, Corrupt),  # another shape than the base
        ({**PLAIN, "proj.lora_C.weight": floats("F32", 1)}, {}, UnsupportedFeature),
        (
            PLAIN,
            {"rank_pattern": {"(a+)+": 2}},
            UnsupportedFeature,
        ),  # an expression that takes for ever
        (PLAIN, {"rank_pattern": ["proj"]}, Corrupt),
        (PLAIN, {"a_newer_option": True}, UnsupportedFeature),
        (PLAIN, {"init_lora_weights": "pissa"}, UnsupportedFeature),
        ({f"x.{A}": PLAIN[A], f"x.{B}": PLAIN[B]}, {}, StructureMismatch),
    ],
)
def test_hostile_lora(
    tensors: dict[str, Raw], config: dict[str, Any], error: type[SparseDeltaError], tmp_path: Path
) -> None:
    given = plain_pair(tmp_path)
    with pytest.raises(error):
        sparsedelta.apply(
            given.base, lora(tmp_path / "adapter", tensors, **config), tmp_path / "out"
        )


def test_pickled_adapter_is_refused(tmp_path: Path) -> None:
    given = plain_pair(tmp_path)
    folder = lora(tmp_path / "adapter", PLAIN)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(UnsupportedFeature, match="can run code"):
        sparsedelta.apply(given.base, folder, tmp_path / "out")


def test_shira_values_by_hand(tmp_path: Path) -> None:
    """0.5 is added at row 1, column 0, and −0.25 at row 0, column 2; all other elements stay."""
    w = Raw("F32", (2, 3), torch.tensor([1.0, 2, 3, 4, 5, 6]).numpy().tobytes())
    target = w.with_data(torch.tensor([1.0, 2, 2.75, 4.5, 5, 6]).numpy().tobytes())
    given = pair(tmp_path, {"a.weight": w}, {"a.weight": target})
    sparsedelta.convert(given.delta, tmp_path / "shira", base=given.base, write_as="shira")
    found = load_file(tmp_path / "shira" / "adapter_model.safetensors")
    assert found.keys() == {"base_model.model.a.shira_indices", "base_model.model.a.shira_weight"}
    assert found["base_model.model.a.shira_indices"].tolist() == [[0, 0, 0, 1, 1], [0, 1, 2, 0, 1]]
    assert found["base_model.model.a.shira_weight"].tolist() == [-0.0, -0.0, -0.25, 0.5, -0.0]
    sparsedelta.apply(given.base, tmp_path / "shira", tmp_path / "out")
    assert_same_files(given.target, tmp_path / "out")


def test_shira_keeps_negative_zeros_of_the_base(tmp_path: Path) -> None:
    w = with_bits(floats("F32", 2, 3), {0: 0x80000000, 5: 0x80000000}, 4)
    given = pair(tmp_path, {"a.weight": w}, {"a.weight": with_bits(w, {3: 0x3F800000}, 4)})
    sparsedelta.convert(given.delta, tmp_path / "shira", base=given.base, write_as="shira")
    sparsedelta.apply(given.base, tmp_path / "shira", tmp_path / "out")
    assert_same_files(given.target, tmp_path / "out")


def test_too_dense_for_shira(tmp_path: Path) -> None:
    w = floats("F32", 2, 3)
    changes = dict.fromkeys(range(6), 1065353216)
    given = pair(tmp_path, {"a.weight": w}, {"a.weight": with_bits(w, changes, 4)})
    with pytest.raises(ValueError, match="too much has changed"):
        sparsedelta.convert(given.delta, tmp_path / "shira", base=given.base, write_as="shira")


def test_what_is_lost_is_not_counted(tmp_path: Path) -> None:
    old = {"a.weight": floats("F32", 4, 4), "b.bias": floats("F32", 4)}
    new = {
        "a.weight": with_bits(old["a.weight"], {3: 0x3F800000}, 4),
        "b.bias": with_bits(old["b.bias"], {0: 0x3F800000, 2: 0x40000000}, 4),
    }
    given = pair(tmp_path, old, new)
    report = sparsedelta.convert(
        given.delta, tmp_path / "shira", base=given.base, write_as="shira", lossy=True
    )
    assert (report.n_changed, report.nnz) == (1, 1)
    assert report.losses == (
        "the 2 changed elements of 'b.bias', because it is not the weight of a linear layer",
    )

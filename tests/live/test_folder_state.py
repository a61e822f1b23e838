"""A model as a side of ``diff`` in the files of a folder whose names and shapes are not the module's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from live.architectures import make_small
from live.live_helpers import copied
from live.model_helpers import change, make, saved
from safetensors.torch import load_file, save_file

import sparsedelta
from sparsedelta import Snapshot
from sparsedelta.errors import StructureMismatch

FILE = "model.safetensors"


def load(cls: Any, folder: Path) -> Any:
    return cls.from_pretrained(folder, dtype=torch.bfloat16)


@pytest.fixture(
    params=[
        "MixtralForCausalLM",
        "OlmoHybridForCausalLM",
        "NomicBertForMaskedLM",
        "Kimi_K25ForConditionalGeneration",
        "ViTForImageClassification",
        "ShieldGemma2ForImageClassification",
    ]
)
def folders(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Path, Path]:
    """Return the class of a model and two of its checkpoints."""
    small = make_small(request.param)
    # Loaded once: transformers keeps some tensors in float32.
    model = load(type(small), saved(small, tmp_path / "small"))
    base = saved(model, tmp_path / "base")
    change(model)
    return type(model), base, saved(model, tmp_path / "target")


def test_the_delta_is_that_of_the_folders(folders: tuple[Any, Path, Path]) -> None:
    cls, base, target = folders
    with sparsedelta.diff(base, target) as wanted:
        expected = wanted.to_bytes()
    with sparsedelta.diff(base, load(cls, target)) as delta:
        assert delta.to_bytes() == expected


def test_a_snapshot_in_a_folder(folders: tuple[Any, Path, Path]) -> None:
    cls, base, target = folders
    model = load(cls, base)
    snapshot = Snapshot(model, folder=base)
    with torch.no_grad():
        for name, tensor in load(cls, target).state_dict().items():
            model.state_dict()[name].copy_(tensor)
    with sparsedelta.diff(base, target) as wanted, snapshot.diff() as delta:
        assert delta.to_bytes() == wanted.to_bytes()


def test_names_that_the_library_would_not_write(tmp_path: Path) -> None:
    base = saved(make("mixtral"), tmp_path / "base")
    own = load_file(base / FILE)
    bare = {name.removeprefix("model."): t for name, t in own.items() if "lm_head" not in name}
    save_file(bare, base / FILE, {"format": "pt"})
    model = transformers.MixtralForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    with pytest.raises(StructureMismatch, match=r"has tensor 'lm_head\.weight', which .* lacks"):
        sparsedelta.diff(base, model)
    inner = model.model
    change(inner)
    with sparsedelta.diff(base, inner) as delta:
        delta.save(tmp_path / "d.sd")
    sparsedelta.apply(base, tmp_path / "d.sd", tmp_path / "out")
    rebuilt = transformers.MixtralModel.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    states = copied(rebuilt.state_dict()), inner.state_dict()
    assert all(torch.equal(states[0][name], tensor) for name, tensor in states[1].items())


def test_a_tensor_of_which_the_model_has_another_form(tmp_path: Path) -> None:
    base = saved(make("mixtral"), tmp_path / "base")
    state = load_file(base / FILE)
    lacking = {name: tensor for name, tensor in state.items() if ".experts.3.w1." not in name}
    assert len(lacking) < len(state)
    save_file(lacking, base / FILE, {"format": "pt"})
    with pytest.raises(StructureMismatch, match=r"cannot be changed .*; save the model"):
        sparsedelta.diff(base, make("mixtral"))
